//! A process tree.
