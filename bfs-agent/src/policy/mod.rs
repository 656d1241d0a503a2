//! Policies: what is done with a file beyond that checkpoints have it. Pure.
//!
//! A policy names files by a path or a pattern, and belongs to the *name*: whatever file stands there is under it. It
//! is written on the primary, travels in the stream as a line of text pairs, and is read again on the backup, so
//! both sides have one meaning of it ([`Table`]).

mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bfs_common::record::{Name, PolicyLine};
use serde::{Deserialize, Serialize};

use crate::nearest::{did_you_mean, nearest};

pub use table::Table;

/// Most policies of a group.
pub const POLICIES_MAX: usize = 1024;
/// Longest pattern and longest place, in bytes (`PATH_MAX` with the zero that ends it).
pub const TEXT_MAX: usize = 4095;
/// Most tries after the first.
const RETRIES_MAX: u32 = 1000;
/// Longest time for a copy: a day.
const TIME_LIMIT_MS_MAX: u64 = 24 * 3_600_000;
/// What makes a path a pattern.
const GLOB: [char; 5] = ['*', '?', '[', '{', '\\'];

/// How a file is backed up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backup {
    /// With each checkpoint, like every file.
    #[default]
    Checkpoint,
    /// A follower on the backup repeats each durable operation.
    Write,
    /// A follower on the backup changes as a whole, when the last writer has closed the file.
    Close,
}

impl Backup {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Checkpoint, Self::Write, Self::Close];

    /// Its name in settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Write => "write",
            Self::Close => "close",
        }
    }
}

/// How a file comes back that its disk lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recovery {
    /// When a person says so, from a checkpoint.
    #[default]
    Manual,
    /// When a program asks for what was captured last.
    Request,
    /// The same, and by itself when a selected process sees an error of the disk.
    Automatic,
}

impl Recovery {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Manual, Self::Request, Self::Automatic];

    /// Its name in settings.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Request => "request",
            Self::Automatic => "automatic",
        }
    }

    fn is_manual(&self) -> bool {
        *self == Self::Manual
    }
}

/// A policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// An absolute path, an absolute pattern, or a pattern for names alone.
    pub pattern: String,
    /// How the files are backed up.
    #[serde(default)]
    pub backup: Backup,
    /// How they come back.
    #[serde(default, skip_serializing_if = "Recovery::is_manual")]
    pub recovery: Recovery,
    /// How often a copy or a recovery is tried again that failed.
    #[serde(default = "retries")]
    pub retries: u32,
    /// How long a copy or a recovery may take, milliseconds.
    #[serde(default = "time_limit_ms")]
    pub time_limit_ms: u64,
    /// Where the follower stands on the backup, if not at the file's path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// Nothing is done by it for now.
    #[serde(default)]
    pub suspended: bool,
}

const fn retries() -> u32 {
    3
}

const fn time_limit_ms() -> u64 {
    60_000
}

/// Why something is no policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct BadPolicy {
    /// Which setting is to blame.
    pub field: String,
    /// What is wrong with it.
    pub why: String,
    /// What would be right.
    pub hint: String,
}

impl BadPolicy {
    /// A setting is wrong.
    #[must_use]
    pub fn new(field: &str, why: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { field: field.into(), why: why.into(), hint: hint.into() }
    }
}

/// The names of all settings.
pub const SETTINGS: [&str; 6] = ["backup", "recovery", "retries", "time_limit_ms", "place", "suspended"];

impl Policy {
    /// One for these files with nothing said about them yet.
    ///
    /// # Errors
    /// [`BadPolicy`] for what is no path and no pattern.
    pub fn new(pattern: &str) -> Result<Self, BadPolicy> {
        check_pattern(pattern)?;
        Ok(Self {
            pattern: pattern.into(),
            backup: Backup::default(),
            recovery: Recovery::default(),
            retries: retries(),
            time_limit_ms: time_limit_ms(),
            place: None,
            suspended: false,
        })
    }

    /// Changes a setting.
    ///
    /// # Errors
    /// [`BadPolicy`] with the name of the setting; nothing is changed then.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), BadPolicy> {
        let number = |max: u64| -> Result<u64, BadPolicy> {
            let found = value.parse::<u64>().ok().filter(|n| *n <= max);
            found.ok_or_else(|| {
                BadPolicy::new(
                    key,
                    format!("{value:?} is no number up to {max}"),
                    "write a number in decimal digits",
                )
            })
        };
        match key {
            "backup" => {
                let names = Backup::ALL.map(Backup::name);
                let found = Backup::ALL.into_iter().find(|class| class.name() == value);
                self.backup = found.ok_or_else(|| {
                    let near = did_you_mean(nearest(&names, value));
                    BadPolicy::new(key, format!("{value:?} is no class of backup{near}"), known(&names))
                })?;
            }
            "recovery" => {
                let names = Recovery::ALL.map(Recovery::name);
                let found = Recovery::ALL.into_iter().find(|class| class.name() == value);
                self.recovery = found.ok_or_else(|| {
                    let near = did_you_mean(nearest(&names, value));
                    BadPolicy::new(key, format!("{value:?} is no class of recovery{near}"), known(&names))
                })?;
            }
            "retries" => self.retries = number(u64::from(RETRIES_MAX))? as u32,
            "time_limit_ms" => self.time_limit_ms = number(TIME_LIMIT_MS_MAX)?.max(1),
            "place" => {
                check_place(value)?;
                self.place = Some(value.into());
            }
            "suspended" => {
                self.suspended = value.parse().map_err(|_| {
                    BadPolicy::new(key, format!("{value:?} is neither"), "write true or false")
                })?;
            }
            _ => {
                let near = did_you_mean(nearest(&SETTINGS, key));
                let why = format!("there is no such setting{near}");
                return Err(BadPolicy::new(key, why, known(&SETTINGS)));
            }
        }
        Ok(())
    }

    /// How long a copy or a recovery may take.
    #[must_use]
    pub const fn time_limit(&self) -> Duration {
        Duration::from_millis(self.time_limit_ms)
    }

    /// As it travels.
    #[must_use]
    pub fn line(&self) -> PolicyLine {
        let mut settings = vec![
            ("backup".to_owned(), self.backup.name().to_owned()),
            ("retries".to_owned(), self.retries.to_string()),
            ("time_limit_ms".to_owned(), self.time_limit_ms.to_string()),
        ];
        if self.recovery != Recovery::Manual {
            settings.push(("recovery".to_owned(), self.recovery.name().to_owned()));
        }
        settings.extend(self.place.as_ref().map(|place| ("place".to_owned(), place.clone())));
        if self.suspended {
            settings.push(("suspended".to_owned(), "true".to_owned()));
        }
        PolicyLine { pattern: self.pattern.clone(), settings }
    }

    /// From a line that travelled.
    ///
    /// # Errors
    /// [`BadPolicy`].
    pub fn from_line(line: &PolicyLine) -> Result<Self, BadPolicy> {
        let mut policy = Self::new(&line.pattern)?;
        for (key, value) in &line.settings {
            policy.set(key, value)?;
        }
        Ok(policy)
    }

    /// The only path that it can name; none of a pattern.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        is_path(&self.pattern).then(|| Path::new(&self.pattern))
    }

    /// Where the follower of a file stands that it names, below the folder of the group's followers.
    #[must_use]
    pub fn place_of(&self, file: &Path) -> PathBuf {
        let below = file.strip_prefix("/").unwrap_or(file);
        match (&self.place, self.path()) {
            (None, _) => below.into(),
            (Some(place), Some(_)) => place.into(),
            (Some(place), None) => Path::new(place).join(below),
        }
    }
}

fn known(names: &[&str]) -> String {
    format!("known are {}", names.join(", "))
}

/// Whether it names one path.
fn is_path(pattern: &str) -> bool {
    pattern.starts_with('/') && !pattern.contains(GLOB)
}

/// Names joined by single slashes, none of them `.` or `..`.
fn is_plain(names: &str) -> bool {
    names.split('/').all(|name| Name::new(name.as_bytes()).is_some())
}

fn check_pattern(pattern: &str) -> Result<(), BadPolicy> {
    let hint =
        "give an absolute path (/srv/db/table), an absolute pattern (/srv/**/*.db), or one for names (*.db)";
    let bad = |why: String| Err(BadPolicy::new("pattern", why, hint));
    if pattern.is_empty() || pattern == "/" {
        return bad("it names no file".into());
    }
    if pattern.len() > TEXT_MAX {
        return bad(format!("it has {} bytes, more than {TEXT_MAX}", pattern.len()));
    }
    if pattern.chars().any(char::is_control) {
        return bad("it has a control character".into());
    }
    match pattern.strip_prefix('/') {
        Some(names) if is_path(pattern) && !is_plain(names) => {
            bad(format!("{pattern:?} is no plain path: it has `.`, `..`, or a slash too many"))
        }
        None if pattern.contains('/') => bad(format!("{pattern:?} is neither absolute nor a name")),
        _ => table::glob(pattern).map(drop),
    }
}

fn check_place(place: &str) -> Result<(), BadPolicy> {
    let bad = |why: String| Err(BadPolicy::new("place", why, "give a relative path, like copies/table"));
    if place.len() > TEXT_MAX {
        return bad(format!("it has {} bytes, more than {TEXT_MAX}", place.len()));
    }
    if !is_plain(place) {
        return bad(format!("{place:?} is no plain relative path"));
    }
    // They end a setting and a pattern on the command line.
    if place.chars().any(|c| c.is_control() || matches!(c, ',' | ':')) {
        return bad(format!("{place:?} has a comma, a colon or a control character"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn field(result: Result<impl std::fmt::Debug, BadPolicy>) -> String {
        result.unwrap_err().field
    }

    #[test]
    fn what_is_wrong_is_named_with_its_setting() {
        for pattern in ["", "/", "a/b", "./a", "/a/../b", "/a//b", "/a/", "/a[", "x\ny"] {
            assert_eq!(field(Policy::new(pattern)), "pattern", "{pattern:?}");
        }
        assert_eq!(field(Policy::new(&format!("/{}", "x".repeat(TEXT_MAX)))), "pattern");
        let mut policy = Policy::new("/srv/db").unwrap();
        let before = policy.clone();
        for (key, value) in [
            ("backup", "wirte"),
            ("recovery", "automatik"),
            ("retries", "-1"),
            ("retries", "1001"),
            ("time_limit_ms", "1d"),
            ("place", "/etc"),
            ("place", "../x"),
            ("place", "a//b"),
            ("place", "a:b"),
            ("suspended", "yes"),
            ("retrys", "1"),
        ] {
            assert_eq!(field(policy.set(key, value)), key, "{value}");
        }
        assert_eq!(policy, before, "nothing was changed");
        let said = policy.set("backup", "wirte").unwrap_err().to_string();
        assert_eq!(said, "backup: \"wirte\" is no class of backup; did you mean \"write\"?");
    }

    #[test]
    fn followers_stand_at_the_path_or_at_a_place() {
        let mut policy = Policy::new("/srv/db").unwrap();
        assert_eq!(policy.place_of(Path::new("/srv/db")), Path::new("srv/db"));
        policy.set("place", "copies/db").unwrap();
        assert_eq!(policy.place_of(Path::new("/srv/db")), Path::new("copies/db"));
        let mut policy = Policy::new("*.db").unwrap();
        policy.set("place", "copies").unwrap();
        assert_eq!(policy.place_of(Path::new("/srv/a.db")), Path::new("copies/srv/a.db"));
    }

    pub(super) fn any_policy() -> impl Strategy<Value = Policy> {
        let pattern = prop_oneof![
            "/[ab]{1,2}(/[ab.]{1,2}[ab]){0,2}",
            "/\\*\\*/[ab]{1,2}",
            "/[ab]/\\*",
            "[ab]{0,2}\\*",
            "[ab]{1,3}",
        ];
        let place = prop::option::of("[a-c]{1,3}(/[a-c]{1,3}){0,2}");
        (pattern, 0..9usize, 0..9u32, 1..90_000u64, place, any::<bool>()).prop_map(
            |(pattern, classes, retries, time_limit_ms, place, suspended)| Policy {
                pattern,
                backup: Backup::ALL[classes / 3],
                recovery: Recovery::ALL[classes % 3],
                retries,
                time_limit_ms,
                place,
                suspended,
            },
        )
    }

    proptest! {
        #[test]
        fn a_policy_travels_as_it_is(policy in any_policy()) {
            prop_assume!(check_pattern(&policy.pattern).is_ok());
            prop_assert_eq!(Policy::from_line(&policy.line()), Ok(policy));
        }

        /// Whatever a place is, the follower stays below its folder.
        #[test]
        fn no_place_leads_out(place in "\\PC{0,12}", file in "(/[a-c]{1,3}){1,3}") {
            for pattern in [file.as_str(), "*"] {
                let mut policy = Policy::new(pattern).unwrap();
                let _ = policy.set("place", &place);
                let at = policy.place_of(Path::new(&file));
                let plain = |part| matches!(part, std::path::Component::Normal(_));
                prop_assert!(at.components().count() > 0 && at.components().all(plain), "{:?}", at);
            }
        }
    }
}
