//! Drives handoff with transport, track, capture and restore.
