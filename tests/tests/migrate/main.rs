//! Suites that move unmodified servers between the lab's hosts by the `pclive` program, while clients use them.

mod failures;
mod memcached;
mod moved;
mod processors;
mod redis;
