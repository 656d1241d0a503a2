//! RULES of `serve --keep`. Pure.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::time::Duration;

use crate::backup::places::group_name_is_valid;
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

/// Rules, of one group or of all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Keep {
    group: Option<String>,
    rules: Rules,
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((group, rules)) = text.split_once(':') else {
            return Ok(Self { group: None, rules: text.parse()? });
        };
        if !group_name_is_valid(group) {
            return Err(format!("{group:?} cannot name a group: write GROUP:RULES, or RULES for all others"));
        }
        Ok(Self { group: Some(group.into()), rules: rules.parse()? })
    }
}

/// What is kept of all groups, and of those that have rules of their own.
///
/// # Errors
/// That rules are given twice.
pub(super) fn retentions(
    all: Vec<Keep>,
    space_percent: u8,
    floor: u32,
) -> Result<(Retention, BTreeMap<String, Retention>), String> {
    let (mut default, mut of) = (None, BTreeMap::new());
    for Keep { group, rules } in all {
        let retention = rules.retention(space_percent, floor);
        let before = match &group {
            None => default.replace(retention),
            Some(group) => of.insert(group.clone(), retention),
        };
        if before.is_some() {
            let whose = group.map_or("all groups".into(), |group| format!("group {group:?}"));
            return Err(format!("--keep is given twice for {whose}: write all rules as one list"));
        }
    }
    let by_default = || DEFAULT.parse::<Rules>().unwrap_or_default().retention(space_percent, floor);
    Ok((default.unwrap_or_else(by_default), of))
}

impl Rules {
    fn retention(self, space_percent: u8, floor: u32) -> Retention {
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
    fn a_group_may_have_rules_of_its_own() {
        let read = |all: &[&str]| {
            let all = all.iter().map(|text| text.parse()).collect::<Result<Vec<Keep>, _>>()?;
            retentions(all, 20, 8)
        };
        let (all, of) = read(&[DEFAULT]).unwrap();
        assert_eq!((all, of.len()), (Retention::default(), 0));
        let (all, of) = read(&["web:last=3,all=1h", "last=5", "mail.in:1d=7d"]).unwrap();
        assert_eq!((all.last, of["web"].last, of["web"].spans.len()), (5, 3, 1));
        assert_eq!(of["mail.in"].spans[0].age, Duration::from_secs(7 * 86_400));
        assert_eq!((of["web"].floor, of["web"].space_percent), (8, 20));
        // Those without are kept as by default.
        assert_eq!(read(&["web:last=3"]).unwrap().0, Retention::default());
        for wrong in
            [&["web:"][..], &[":last=1"], &["a/b:last=1"], &["last=1", "last=2"], &["w:last=1", "w:last=2"]]
        {
            assert!(read(wrong).is_err(), "{wrong:?}");
        }
    }

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
