//! Who stands at the door: connections that have not proven who they are yet. Pure.
//!
//! There is a bound, and beyond it somebody is sent away: the one who stands there longest, of the address from which most
//! stand there. A handshake of somebody honest takes milliseconds, so whoever fills the places and waits is sent away
//! before him, from whatever address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

/// At most so many altogether.
pub const CROWD_MAX: usize = 256;
/// At most so many of one address.
pub const OF_ONE_MAX: usize = 64;

/// See the module. Numbers are those of the connections, each higher than the one before.
#[derive(Debug, Default)]
pub struct Crowd {
    by_address: BTreeMap<IpAddr, Vec<u64>>,
}

impl Crowd {
    /// Somebody comes; the answer is who has to go for that.
    #[must_use]
    pub fn enter(&mut self, number: u64, address: IpAddr) -> Option<u64> {
        let address = network(address);
        let all: usize = self.by_address.values().map(Vec::len).sum();
        let of_one = self.by_address.get(&address).map_or(0, Vec::len);
        let crowded = if of_one >= OF_ONE_MAX {
            Some(address)
        } else if all >= CROWD_MAX {
            self.by_address.iter().max_by_key(|(_, numbers)| numbers.len()).map(|(address, _)| *address)
        } else {
            None
        };
        let gone = crowded.and_then(|address| self.by_address.get(&address)?.first().copied());
        if let (Some(gone), Some(address)) = (gone, crowded) {
            self.remove(gone, address);
        }
        self.by_address.entry(address).or_default().push(number);
        gone
    }

    /// Somebody is known now, or has gone.
    pub fn leave(&mut self, number: u64, address: IpAddr) {
        self.remove(number, network(address));
    }

    fn remove(&mut self, number: u64, address: IpAddr) {
        let Some(numbers) = self.by_address.get_mut(&address) else { return };
        numbers.retain(|there| *there != number);
        if numbers.is_empty() {
            self.by_address.remove(&address);
        }
    }
}

/// Who has an IPv6 address has a whole /64 of them.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from(u128::from(v6) >> 64 << 64)),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    #[test]
    fn whoever_fills_the_places_makes_room_for_others() {
        let mut crowd = Crowd::default();
        for number in 0..OF_ONE_MAX as u64 {
            assert_eq!(crowd.enter(number, v4(1)), None);
        }
        assert_eq!(crowd.enter(1000, v4(1)), Some(0), "the oldest of its own");
        assert_eq!(crowd.enter(1001, v4(2)), None, "another one is not touched");
        let left = CROWD_MAX - OF_ONE_MAX - 1;
        for number in 0..left as u64 {
            assert_eq!(crowd.enter(2000 + number, v4(3 + (number % 4) as u8)), None);
        }
        assert_eq!(crowd.enter(3000, v4(8)), Some(1), "the oldest of those who are most");
        crowd.leave(1001, v4(2));
        assert_eq!(crowd.enter(3001, v4(9)), None);
    }

    #[test]
    fn a_network_counts_as_one() {
        let mut crowd = Crowd::default();
        let host = |n: u16| IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 1, n, n, n, n));
        for number in 0..OF_ONE_MAX as u64 {
            assert_eq!(crowd.enter(number, host(number as u16)), None);
        }
        assert_eq!(crowd.enter(50, host(99)), Some(0));
        let mapped: IpAddr = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(network(mapped), v4(1));
    }

    #[test]
    fn it_holds_nothing_of_those_who_left() {
        let mut crowd = Crowd::default();
        for number in 0..10_000 {
            let address = v4((number % 7) as u8);
            assert_eq!(crowd.enter(number, address), None);
            crowd.leave(number, address);
        }
        assert!(crowd.by_address.is_empty());
        crowd.leave(5, v4(1));
    }
}
