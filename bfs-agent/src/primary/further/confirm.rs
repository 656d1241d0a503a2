//! When a checkpoint of a group with several destinations counts as confirmed. Pure.

use std::fmt;
use std::str::FromStr;

use bfs_common::record::CheckpointId;
use serde::{Deserialize, Serialize};

/// Whose confirmation counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Confirm {
    /// All that are attached, and at least one.
    #[default]
    Attached,
    /// All, also those that are away.
    All,
    /// Whoever is first.
    Any,
    /// So many; at least one.
    Count(u32),
    /// This one, as given to `--backup`.
    Named(String),
}

/// How one destination stands.
#[derive(Clone, Copy, Debug)]
pub struct At<'a> {
    /// Its address.
    pub address: &'a str,
    /// Whether it takes checkpoints as they come.
    pub attached: bool,
    /// The last checkpoint that it has (confirmed, or applied).
    pub number: CheckpointId,
}

impl Confirm {
    /// The last checkpoint of which that can be said; 0 if of none.
    #[must_use]
    pub fn of(&self, all: &[At<'_>]) -> CheckpointId {
        let numbers = |which: &dyn Fn(&At<'_>) -> bool| {
            let mut numbers: Vec<_> = all.iter().filter(|at| which(at)).map(|at| at.number).collect();
            numbers.sort_unstable_by(|a, b| b.cmp(a));
            numbers
        };
        let of_these = |numbers: Vec<CheckpointId>, count: usize| {
            count.checked_sub(1).and_then(|at| numbers.get(at).copied()).unwrap_or(CheckpointId(0))
        };
        match self {
            Self::Attached => {
                let attached = numbers(&|at| at.attached);
                let count = attached.len();
                of_these(attached, count)
            }
            Self::All => of_these(numbers(&|_| true), all.len()),
            Self::Any => of_these(numbers(&|_| true), 1),
            Self::Count(count) => of_these(numbers(&|_| true), *count as usize),
            Self::Named(name) => of_these(numbers(&|at| at.address == name), 1),
        }
    }

    /// Why these destinations can never satisfy it.
    ///
    /// # Errors
    /// In words.
    pub fn check(&self, addresses: &[String]) -> Result<(), String> {
        match self {
            Self::Count(0) => Err("nothing would be confirmed by 0 destinations".into()),
            Self::Count(count) if *count as usize > addresses.len() => {
                Err(format!("there are {} destinations, not {count}", addresses.len()))
            }
            Self::Named(name) if !addresses.contains(name) => {
                Err(format!("no --backup is {name:?}: write it as it is given there"))
            }
            _ => Ok(()),
        }
    }
}

impl FromStr for Confirm {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "attached" => Self::Attached,
            "all" => Self::All,
            "any" => Self::Any,
            _ => match text.parse() {
                Ok(0) => return Err("nothing would be confirmed by 0 destinations".into()),
                Ok(count) => Self::Count(count),
                Err(_) if text.contains(':') => Self::Named(text.into()),
                Err(_) => {
                    return Err("write attached, all, any, a number of destinations, or one of them as \
                                given to --backup"
                        .into());
                }
            },
        })
    }
}

impl fmt::Display for Confirm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attached => f.write_str("attached"),
            Self::All => f.write_str("all"),
            Self::Any => f.write_str("any"),
            Self::Count(count) => write!(f, "{count}"),
            Self::Named(name) => f.write_str(name),
        }
    }
}

impl TryFrom<String> for Confirm {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Confirm> for String {
    fn from(confirm: Confirm) -> Self {
        confirm.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(address: &str, attached: bool, number: u64) -> At<'_> {
        At { address, attached, number: CheckpointId(number) }
    }

    #[test]
    fn whose_confirmation_counts() {
        let all = [at("dir:a", true, 9), at("dir:b", true, 7), at("dir:c", false, 3)];
        let of = |text: &str| text.parse::<Confirm>().unwrap().of(&all).0;
        assert_eq!(["attached", "all", "any"].map(of), [7, 3, 9]);
        assert_eq!(["1", "2", "3", "4"].map(of), [9, 7, 3, 0]);
        assert_eq!(["dir:b", "dir:c", "dir:d"].map(of), [7, 3, 0]);
        assert_eq!(Confirm::Attached.of(&[at("dir:a", false, 9)]).0, 0, "at least one");
        assert_eq!(Confirm::All.of(&[]).0, 0);
    }

    #[test]
    fn what_is_written_is_understood_and_shown_again() {
        for text in ["attached", "all", "any", "2", "tcp://backup.example:7400", "dir:store"] {
            assert_eq!(text.parse::<Confirm>().unwrap().to_string(), text);
        }
        for text in ["", "0", "-1", "some", "most"] {
            text.parse::<Confirm>().unwrap_err();
        }
    }

    #[test]
    fn what_can_never_be_is_refused() {
        let two = ["dir:a".to_owned(), "dir:b".to_owned()];
        for good in ["attached", "all", "any", "2", "dir:b"] {
            good.parse::<Confirm>().unwrap().check(&two).unwrap();
        }
        for bad in ["3", "dir:c"] {
            bad.parse::<Confirm>().unwrap().check(&two).unwrap_err();
        }
    }
}
