//! Which policy holds for a name.
//!
//! A path that is written out beats every pattern; of the patterns that match, the last one in the table holds. What
//! is suspended still holds: it keeps others from the file, and nothing is done by it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use globset::{Glob, GlobBuilder, GlobSet, GlobSetBuilder};

use super::{Backup, BadPolicy, POLICIES_MAX, Policy};

/// The policies of a group.
#[derive(Clone, Debug, Default)]
pub struct Table {
    policies: Vec<Policy>,
    paths: HashMap<PathBuf, usize>,
    /// Patterns for paths, and which policy each is of.
    globs: (GlobSet, Vec<usize>),
    /// Patterns for names.
    names: (GlobSet, Vec<usize>),
}

impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        self.policies == other.policies
    }
}

pub(super) fn glob(pattern: &str) -> Result<Glob, BadPolicy> {
    GlobBuilder::new(pattern).literal_separator(true).backslash_escape(true).build().map_err(|e| {
        let why = format!("{pattern:?}: {}", e.kind());
        BadPolicy::new("pattern", why, "put a backslash before what is meant as it stands")
    })
}

impl Table {
    /// A table of these, in this order.
    ///
    /// # Errors
    /// [`BadPolicy`] when there are too many, two have one pattern, or two would have one place.
    pub fn new(policies: Vec<Policy>) -> Result<Self, BadPolicy> {
        if policies.len() > POLICIES_MAX {
            let why = format!("there are {} policies, more than {POLICIES_MAX}", policies.len());
            return Err(BadPolicy::new("pattern", why, "use a pattern for several files"));
        }
        let mut table = Self::default();
        let (mut globs, mut names) = (GlobSetBuilder::new(), GlobSetBuilder::new());
        let mut patterns = HashMap::new();
        for (at, policy) in policies.iter().enumerate() {
            if patterns.insert(policy.pattern.as_str(), at).is_some() {
                let why = format!("{:?} has a policy already", policy.pattern);
                return Err(BadPolicy::new("pattern", why, "change that one with `bfs-agent policy set`"));
            }
            if let Some(path) = policy.path() {
                table.paths.insert(path.into(), at);
            } else if policy.pattern.starts_with('/') {
                globs.add(glob(&policy.pattern)?);
                table.globs.1.push(at);
            } else {
                names.add(glob(&policy.pattern)?);
                table.names.1.push(at);
            }
        }
        check_places(&policies)?;
        let built = |set: GlobSetBuilder| {
            set.build().map_err(|e| BadPolicy::new("pattern", e.to_string(), "use fewer or shorter patterns"))
        };
        (table.globs.0, table.names.0) = (built(globs)?, built(names)?);
        table.policies = policies;
        Ok(table)
    }

    /// All of them, in order.
    #[must_use]
    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// Whether nothing is said of any file.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.policies.is_empty()
    }

    /// Whether a file can have a follower.
    #[must_use]
    pub fn has_followers(&self) -> bool {
        self.policies.iter().any(|policy| policy.backup != Backup::Checkpoint)
    }

    /// Whether patterns decide, so that every file has to be looked at.
    #[must_use]
    pub fn has_patterns(&self) -> bool {
        self.paths.len() < self.policies.len()
    }

    /// The paths that are written out.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.paths.keys().map(PathBuf::as_path)
    }

    /// The policy that holds for a path.
    #[must_use]
    pub fn holds(&self, path: &Path) -> Option<&Policy> {
        if let Some(at) = self.paths.get(path) {
            return self.policies.get(*at);
        }
        let last = |(set, of): &(GlobSet, Vec<usize>), text: &Path| {
            if set.is_empty() {
                None
            } else {
                set.matches(text).into_iter().filter_map(|m| of.get(m)).max().copied()
            }
        };
        let by_name = path.file_name().and_then(|name| last(&self.names, Path::new(name)));
        last(&self.globs, path).max(by_name).and_then(|at| self.policies.get(at))
    }
}

/// No two policies put one follower below another, or both at one place, as far as their places say.
fn check_places(policies: &[Policy]) -> Result<(), BadPolicy> {
    let mut taken: BTreeMap<&Path, &Policy> = BTreeMap::new();
    for policy in policies {
        let (Some(place), Some(_)) = (&policy.place, policy.path()) else { continue };
        let place = Path::new(place);
        let clash = |other: &&Path| other.starts_with(place) || place.starts_with(other);
        if let Some(other) = taken.keys().copied().find(clash) {
            let why = format!(
                "{} is in the way of {}, the place of {:?}",
                place.display(),
                other.display(),
                taken[other].pattern
            );
            return Err(BadPolicy::new("place", why, "give another place"));
        }
        taken.insert(place, policy);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::any_policy;
    use super::*;
    use proptest::prelude::*;

    fn table(patterns: &[&str]) -> Table {
        Table::new(patterns.iter().map(|p| Policy::new(p).unwrap()).collect()).unwrap()
    }

    fn holds(table: &Table, path: &str) -> String {
        table.holds(Path::new(path)).map(|policy| policy.pattern.clone()).unwrap_or_default()
    }

    #[test]
    fn a_path_beats_patterns_and_the_last_pattern_beats_those_before() {
        let table = table(&["/srv/a.db", "*.db", "/srv/*", "/srv/deep/**", "b.db"]);
        for (path, pattern) in [
            ("/srv/a.db", "/srv/a.db"),
            ("/srv/c.db", "/srv/*"),
            ("/srv/b.db", "b.db"),
            ("/etc/c.db", "*.db"),
            ("/srv/deep/x/c.db", "/srv/deep/**"),
            ("/srv/x/y", ""),
            ("/etc/x", ""),
        ] {
            assert_eq!(holds(&table, path), pattern, "{path}");
        }
    }

    #[test]
    fn what_cannot_stand_together_is_refused() {
        let place = |pattern: &str, place: &str| {
            let mut policy = Policy::new(pattern).unwrap();
            policy.set("place", place).unwrap();
            policy
        };
        let field = |policies: Vec<Policy>| Table::new(policies).unwrap_err().field;
        assert_eq!(field(vec![Policy::new("/a").unwrap(), Policy::new("/a").unwrap()]), "pattern");
        assert_eq!(field(vec![place("/a", "x"), place("/b", "x")]), "place");
        assert_eq!(field(vec![place("/a", "x/y"), place("/b", "x")]), "place");
        assert!(Table::new(vec![place("/a", "x"), place("*.db", "x")]).is_ok());
        let many = (0..=POLICIES_MAX).map(|n| Policy::new(&format!("/{n}")).unwrap()).collect();
        assert_eq!(field(many), "pattern");
    }

    proptest! {
        /// The table decides as going over the policies one by one does.
        #[test]
        fn the_decision_is_that_of_the_rule(
            policies in prop::collection::vec(any_policy(), 0..8),
            path in "(/[ab]{1,2}){1,3}",
        ) {
            let Ok(table) = Table::new(policies.clone()) else { return Ok(()) };
            let path = Path::new(&path);
            let exact = policies.iter().find(|policy| policy.path() == Some(path));
            let matches = |policy: &&Policy| {
                let matcher = glob(&policy.pattern).unwrap().compile_matcher();
                let text = if policy.pattern.starts_with('/') { path } else { Path::new(path.file_name().unwrap()) };
                policy.path().is_none() && matcher.is_match(text)
            };
            prop_assert_eq!(table.holds(path), exact.or_else(|| policies.iter().rfind(matches)));
        }
    }
}
