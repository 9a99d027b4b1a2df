//! Numbers and bytes that depend on nothing but a seed.

/// Spreads every bit of `x` over the whole result (the finalizer of splitmix64; a bijection).
pub fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A splitmix64 generator: small, fast, the same everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that repeats itself for the same seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.draw()) * limit as u128) >> 64) as usize
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// `length` bytes that belong to `seed`.
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut bytes: Vec<u8> =
        std::iter::repeat_with(|| rng.draw().to_le_bytes()).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

/// A number that no other start of the program gets.
pub fn instance() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    mix(now.as_nanos() as u64 ^ (u64::from(std::process::id()) << 40))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_repeat_and_stay_in_range() {
        let (mut one, mut two) = (Rng::new(7), Rng::new(7));
        for limit in 1..1000 {
            let number = one.below(limit);
            assert!(number < limit);
            assert_eq!(number, two.below(limit));
        }
    }

    #[test]
    fn bytes_have_the_length_asked_for_and_differ_by_seed() {
        assert_eq!(bytes(1, 13).len(), 13);
        assert_eq!(bytes(1, 13), bytes(1, 16)[..13]);
        assert_ne!(bytes(1, 64), bytes(2, 64));
    }
}
