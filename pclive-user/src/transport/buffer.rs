//! Page-aligned buffers that are used again and again: a stream's memory is bounded by how many it has.

use super::error::{Error, Result};
use memmap2::MmapMut;
use pclive_wire::PAGE_SIZE;
use pclive_wire::page_frame::{MAX_CONTENTS_LEN, MAX_HEAD_LEN};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Room in front of the contents: whole pages, so that these are aligned.
const HEAD_ROOM: usize = MAX_HEAD_LEN.next_multiple_of(PAGE_SIZE as usize);

/// A fixed number of [`PageBuffer`]s.
#[derive(Clone, Debug)]
pub struct BufferPool(Arc<Free>);

#[derive(Debug)]
struct Free {
    buffers: Mutex<Vec<MmapMut>>,
    returned: Condvar,
}

impl Free {
    fn lock(&self) -> MutexGuard<'_, Vec<MmapMut>> {
        // A list of buffers is valid whatever happened to the thread that held it.
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BufferPool {
    /// A pool of `count` buffers; their memory is touched when they are first used.
    pub fn new(count: usize) -> Result<Self> {
        let map = || MmapMut::map_anon(HEAD_ROOM + MAX_CONTENTS_LEN);
        let buffers = (0..count)
            .map(|_| map())
            .collect::<std::io::Result<_>>()
            .map_err(|source| Error::Local("map a page buffer", source))?;
        Ok(Self(Arc::new(Free { buffers: Mutex::new(buffers), returned: Condvar::new() })))
    }

    /// A free buffer, if there is one.
    pub fn try_take(&self) -> Option<PageBuffer> {
        self.0.lock().pop().map(|map| self.lend(map))
    }

    /// A free buffer; waits until one is dropped.
    pub fn take(&self) -> PageBuffer {
        let mut buffers = self.0.lock();
        loop {
            if let Some(map) = buffers.pop() {
                return self.lend(map);
            }
            buffers = self.0.returned.wait(buffers).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lend(&self, map: MmapMut) -> PageBuffer {
        PageBuffer { map: Some(map), home: self.clone() }
    }
}

/// Room for a batch: pages for its head, then [`MAX_CONTENTS_LEN`] bytes of contents, page-aligned. Returns to its pool
/// when dropped.
#[derive(Debug)]
pub struct PageBuffer {
    /// `None` only while it is dropped.
    map: Option<MmapMut>,
    home: BufferPool,
}

impl PageBuffer {
    /// Room for page contents.
    pub fn contents(&self) -> &[u8] {
        self.map.as_ref().map_or(&[], |map| &map[HEAD_ROOM..])
    }

    /// Room for page contents.
    pub fn contents_mut(&mut self) -> &mut [u8] {
        self.split_mut().1
    }

    /// Room for header and runs.
    pub(super) fn head(&self) -> &[u8] {
        self.map.as_ref().map_or(&[], |map| &map[..HEAD_ROOM])
    }

    /// Room for header and runs, and room for page contents.
    pub(super) fn split_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        match &mut self.map {
            Some(map) => map.split_at_mut(HEAD_ROOM),
            None => (&mut [], &mut []),
        }
    }
}

impl Drop for PageBuffer {
    fn drop(&mut self) {
        self.home.0.lock().extend(self.map.take());
        self.home.0.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn buffers_are_aligned_and_come_back() {
        let pool = BufferPool::new(1).unwrap();
        let mut buffer = pool.take();
        assert_eq!(buffer.contents().as_ptr() as usize % 4096, 0);
        assert_eq!((buffer.head().len(), buffer.contents_mut().len()), (8192, 1 << 20));
        assert!(pool.try_take().is_none());

        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.take());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            drop(buffer);
            waiting.join().unwrap();
        });
        assert!(pool.try_take().is_some());
    }
}
