//! RULES of `serve --keep`. Pure.

use std::str::FromStr;
use std::time::Duration;

use crate::backup::retention::{Retention, Span};
use crate::primary::schedule::parse_time;

/// What is kept unless something else is asked for.
pub(super) const DEFAULT: &str = "all=1h,1m=1d,1d=30d";

/// Which checkpoints are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Rules {
    spans: Vec<Span>,
    last: u32,
}

impl Rules {
    pub(super) fn retention(self, space_percent: u8, floor: u32) -> Retention {
        let Self { spans, last } = self;
        Retention { spans, last, space_percent, floor, merge_floor: floor, ..Retention::default() }
    }
}

impl FromStr for Rules {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut rules = Self::default();
        for word in text.split(',').map(str::trim) {
            let wrong =
                || format!("{word:?} is none of all=AGE, SPAN=AGE, last=NUMBER (for example {DEFAULT})");
            let (what, much) = word.split_once('=').unwrap_or(("last", word));
            if what == "last" {
                rules.last = much.parse().map_err(|_| wrong())?;
                continue;
            }
            let every = if what == "all" { Duration::ZERO } else { parse_time(what).map_err(|_| wrong())? };
            rules.spans.push(Span { every, age: parse_time(much).map_err(|_| wrong())? });
        }
        Ok(rules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read() {
        let rules: Rules = DEFAULT.parse().unwrap();
        let retention = rules.retention(20, 8);
        assert_eq!(retention, Retention::default());
        assert_eq!("64".parse::<Rules>(), "last=64".parse());
        assert_eq!("last=3,all=1s".parse::<Rules>().unwrap().last, 3);
        for text in ["", "x", "all", "all=1", "1m=1x", "last=-1", "all=1h,,"] {
            assert!(text.parse::<Rules>().is_err(), "{text}");
        }
    }
}
