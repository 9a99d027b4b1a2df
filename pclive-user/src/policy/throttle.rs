//! How fast pages may go for the container's clients to keep their share.
//!
//! Reading, sending and placing pages takes processors and memory bandwidth, which a busy container then lacks. How much
//! that costs its clients nobody knows beforehand; but what goes over the container's network links tells. When that
//! becomes less than the share of the usual traffic that was asked for, pages go slower, until the container has it back;
//! when there is more to spare, faster again.
//!
//! Traffic may fall for other reasons: clients that leave look like clients that suffer. So pages never go slower than
//! two fifths of the fastest that was seen: at worst a migration takes two and a half times as long.

/// What the limit is multiplied with when the clients get too little. Much at once, and little by little back: two busy
/// processors go from enough to far too little within a few percent of load, and need a while to recover.
const SLOWER: f64 = 0.75;
/// What the limit is multiplied with when they get enough.
const FASTER: f64 = 1.02;
/// So much above the share asked for is enough to go faster; in between the limit stays.
const MARGIN: f64 = 0.03;
/// The smallest limit, as a share of the fastest rate that was seen.
const FLOOR: f64 = 0.4;
/// Bytes per second, below which a container is not busy: keep-alives and the like come and go by chance.
const QUIET: f64 = 100_000.0;

/// The limit of one migration.
#[derive(Clone, Debug)]
pub struct Throttle {
    /// The share that is to be kept, 0 to 1.
    share: f64,
    /// The container's traffic without a migration, in bytes per second.
    usual: f64,
    /// The fastest that pages went.
    fastest: f64,
    limit: Option<f64>,
}

impl Throttle {
    /// Keeps `percent` of the `usual` traffic, in bytes per second. `None` if nothing is to be kept or there is no traffic
    /// to speak of.
    pub fn new(percent: u8, usual: f64) -> Option<Self> {
        let busy = percent > 0 && usual >= QUIET;
        busy.then_some(Self { share: f64::from(percent) / 100.0, usual, fastest: 0.0, limit: None })
    }

    /// Takes in the container's traffic and the rate of pages since the last time, both in bytes per second. Returns the
    /// limit for pages from now on, if there is to be one.
    pub fn observe(&mut self, traffic: f64, pages: f64) -> Option<u64> {
        self.fastest = self.fastest.max(pages);
        let share = traffic / self.usual;
        if share < self.share {
            let slower = self.limit.unwrap_or(self.fastest) * SLOWER;
            self.limit = Some(slower.max(self.fastest * FLOOR));
        } else if share > self.share + MARGIN {
            let faster = self.limit.map(|limit| limit * FASTER);
            self.limit = faster.filter(|&limit| limit < self.fastest);
        }
        self.limit.map(|limit| limit as u64)
    }

    /// How long the given number of bytes takes at the fastest rate, in seconds; `None` until there was one.
    pub fn shortest_time(&self, bytes: u64) -> Option<f64> {
        (self.fastest > 0.0).then(|| bytes as f64 / self.fastest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the clients get of `usual` if pages at 1 MB/s take everything from them.
    fn traffic(usual: f64, pages: f64) -> f64 {
        usual * (1.0 - pages / 1e6)
    }

    #[test]
    fn the_clients_keep_their_share() {
        for (percent, slowest, fastest) in [(85, 1.1e5, 1.6e5), (50, 4.5e5, 5.1e5), (5, 9.1e5, 1e6)] {
            let mut throttle = Throttle::new(percent, 1e9).unwrap();
            let mut pages = 1e6 * (1.0 - 0.01);
            for _ in 0..100 {
                pages = throttle.observe(traffic(1e9, pages), pages).map_or(9.9e5, |limit| limit as f64);
            }
            // Not below two fifths of 0.99 MB/s.
            let slowest = f64::max(slowest, 3.9e5);
            let fastest = f64::max(fastest, 4e5);
            assert!((slowest..fastest).contains(&pages), "{percent} %: {pages}");
        }
    }

    #[test]
    fn a_limit_goes_away_when_it_is_not_needed() {
        let mut throttle = Throttle::new(85, 1e6).unwrap();
        assert_eq!(throttle.observe(1e6, 1e8), None);
        assert_eq!(throttle.observe(0.8e6, 1e8), Some(75_000_000));
        assert_eq!(throttle.observe(0.86e6, 7.5e7), Some(75_000_000));
        assert_eq!(throttle.observe(0.9e6, 7.5e7), Some(76_500_000));
        assert_eq!(throttle.observe(2e6, 7.6e7), Some(78_030_000));
        assert_eq!((0..20).map(|_| throttle.observe(0.9e6, 7e7)).last(), Some(None));
    }

    #[test]
    fn it_never_goes_slower_than_two_fifths() {
        let mut throttle = Throttle::new(100, 1e6).unwrap();
        throttle.observe(1e6, 1e8);
        let slowest = (0..100).map(|_| throttle.observe(0.0, 1e3)).last();
        assert_eq!(slowest, Some(Some(40_000_000)));
    }

    #[test]
    fn nothing_is_kept_for_nobody() {
        assert!(Throttle::new(0, 1e9).is_none());
        assert!(Throttle::new(85, 1000.0).is_none());
    }
}
