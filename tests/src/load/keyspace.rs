//! The keys, what each of them may hold, and whether an answer is right.

use std::fmt::Write as _;
use std::ops::RangeInclusive;

/// Bytes at the start of a value that name its key and version: `KKKKKKKKKK VVVVVVVVVV `.
const HEADER_BYTES: usize = 22;
/// How far into the pattern a value's body may start.
const PATTERN_SHIFTS: usize = 4096;

/// The number of a key.
pub(super) type Key = u32;
/// The number of a write to a key; 0 is no write at all.
pub(super) type Version = u32;

#[derive(Debug, Clone, Copy, Default)]
struct KeyState {
    /// The oldest version that a read sent now may return.
    floor: Version,
    /// The newest version that was sent.
    newest: Version,
    /// Whether `newest` has not been answered yet. It stays so if its connection breaks: then nobody knows.
    writing: bool,
}

/// All keys with their versions.
#[derive(Debug)]
pub(super) struct Keyspace {
    keys: Vec<KeyState>,
    hot: u32,
    value_bytes: RangeInclusive<usize>,
    /// Values' bodies are cut from here, so filling and checking one are a copy and a comparison.
    pattern: Vec<u8>,
    random: Random,
}

impl Keyspace {
    /// Enough keys for `data_bytes` of values, of which those with `hot_bytes` are used by [`Self::pick`].
    pub(super) fn new(data_bytes: u64, hot_bytes: u64, value_bytes: RangeInclusive<usize>) -> Self {
        let value_bytes = *value_bytes.start().max(&HEADER_BYTES)..=*value_bytes.end().max(&HEADER_BYTES);
        let mean = (value_bytes.start() + value_bytes.end()).div_ceil(2) as u64;
        let count = |bytes: u64| u32::try_from((bytes / mean).max(1)).expect("fewer than 2^32 keys");
        let keys = vec![KeyState::default(); count(data_bytes) as usize];
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let pattern = (0..PATTERN_SHIFTS + value_bytes.end()).map(|_| random.next() as u8).collect();
        Self { hot: count(hot_bytes.min(data_bytes)), keys, value_bytes, pattern, random }
    }

    /// How many keys there are.
    pub(super) fn len(&self) -> u32 {
        self.keys.len() as u32
    }

    /// One of the hot keys at random, and a number below 100.
    pub(super) fn pick(&mut self) -> (Key, u8) {
        let random = self.random.next();
        ((random % u64::from(self.hot)) as Key, ((random >> 40) % 100) as u8)
    }

    /// The oldest version that a read sent now may return.
    pub(super) fn floor(&self, key: Key) -> Version {
        self.keys[key as usize].floor
    }

    /// Starts a write: its version, unless another write to the key is in flight.
    pub(super) fn start_write(&mut self, key: Key) -> Option<Version> {
        let state = &mut self.keys[key as usize];
        if state.writing {
            return None;
        }
        state.newest += 1;
        state.writing = true;
        Some(state.newest)
    }

    /// The write in flight was acknowledged.
    pub(super) fn acknowledge(&mut self, key: Key) {
        let state = &mut self.keys[key as usize];
        state.writing = false;
        state.floor = state.newest;
    }

    /// Appends the value of a version.
    pub(super) fn append_value(&self, out: &mut Vec<u8>, key: Key, version: Version) {
        out.extend_from_slice(header(key, version).as_bytes());
        out.extend_from_slice(self.body(key, version));
    }

    /// The length of a key's values, whatever their version.
    pub(super) fn value_len(&self, key: Key) -> usize {
        let (start, end) = (*self.value_bytes.start(), *self.value_bytes.end());
        start + Random(u64::from(key)).next() as usize % (end - start + 1)
    }

    fn body(&self, key: Key, version: Version) -> &[u8] {
        let shift = (key as usize * 131 + version as usize * 17) % PATTERN_SHIFTS;
        &self.pattern[shift..shift + self.value_len(key) - HEADER_BYTES]
    }

    /// Checks what a read sent when `floor` was the oldest allowed version has returned.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check(&mut self, key: Key, floor: Version, value: Option<&[u8]>) -> Result<(), String> {
        let KeyState { newest, .. } = self.keys[key as usize];
        let Some(value) = value else {
            return if floor == 0 {
                Ok(())
            } else {
                Err(format!("key {key}: missing, version {floor} was there"))
            };
        };
        let (found, version) = parse_header(value)
            .ok_or_else(|| format!("key {key}: {} bytes without a header", value.len()))?;
        if found != key {
            return Err(format!("key {key}: the value of key {found}"));
        }
        if !(floor..=newest).contains(&version) {
            return Err(format!("key {key}: version {version} instead of {floor} to {newest}"));
        }
        if &value[HEADER_BYTES..] != self.body(key, version) {
            return Err(format!("key {key}: version {version} is damaged"));
        }
        let state = &mut self.keys[key as usize];
        state.floor = state.floor.max(version);
        Ok(())
    }
}

fn header(key: Key, version: Version) -> String {
    let mut header = String::with_capacity(HEADER_BYTES);
    write!(header, "{key:010} {version:010} ").expect("a String takes everything");
    header
}

fn parse_header(value: &[u8]) -> Option<(Key, Version)> {
    let header = std::str::from_utf8(value.get(..HEADER_BYTES)?).ok()?;
    Some((header.get(..10)?.parse().ok()?, header.get(11..21)?.parse().ok()?))
}

/// SplitMix64: a load needs even spread, speed and the same sequence in each run.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(keys: &Keyspace, key: Key, version: Version) -> Vec<u8> {
        let mut value = Vec::new();
        keys.append_value(&mut value, key, version);
        value
    }

    #[test]
    fn an_acknowledged_write_must_be_read() {
        let mut keys = Keyspace::new(1 << 20, 1 << 20, 64..=256);
        assert!(keys.check(7, 0, None).is_ok(), "nothing was written yet");
        assert_eq!(keys.start_write(7), Some(1));
        assert_eq!(keys.start_write(7), None, "one write at a time");
        let floor_in_flight = keys.floor(7);
        assert!(keys.check(7, floor_in_flight, None).is_ok(), "the write may not have arrived");
        keys.acknowledge(7);
        assert!(keys.check(7, keys.floor(7), None).is_err(), "a lost acknowledged write");
        keys.start_write(7);
        keys.acknowledge(7);
        let stale = value(&keys, 7, 1);
        assert!(keys.check(7, keys.floor(7), Some(&stale)).is_err(), "a stale value");
    }

    #[test]
    fn a_version_once_seen_stays() {
        let mut keys = Keyspace::new(1 << 20, 1 << 20, 64..=256);
        keys.start_write(3);
        keys.acknowledge(3);
        keys.start_write(3);
        let (old, new) = (value(&keys, 3, 1), value(&keys, 3, 2));
        assert!(keys.check(3, keys.floor(3), Some(&old)).is_ok());
        assert!(keys.check(3, keys.floor(3), Some(&new)).is_ok(), "in flight, and it arrived");
        assert!(keys.check(3, keys.floor(3), Some(&old)).is_err(), "it cannot vanish again");
    }

    #[test]
    fn damage_is_noticed() {
        let mut keys = Keyspace::new(1 << 20, 1 << 20, 64..=256);
        keys.start_write(5);
        keys.acknowledge(5);
        let good = value(&keys, 5, 1);
        assert_eq!(good.len(), keys.value_len(5));
        for damaged in [0, 12, HEADER_BYTES, good.len() - 1] {
            let mut bad = good.clone();
            bad[damaged] ^= 1;
            assert!(keys.check(5, 1, Some(&bad)).is_err(), "byte {damaged}");
        }
        assert!(keys.check(5, 1, Some(&good[..good.len() - 1])).is_err());
        assert!(keys.check(5, 1, Some(&[])).is_err());
        assert!(keys.check(5, 1, Some(&good)).is_ok());
    }

    #[test]
    fn the_hot_set_is_a_part() {
        let mut keys = Keyspace::new(1 << 24, 1 << 20, 1024..=1024);
        assert_eq!(keys.len(), 1 << 14);
        assert!((0..10_000).all(|_| keys.pick().0 < 1 << 10));
    }
}
