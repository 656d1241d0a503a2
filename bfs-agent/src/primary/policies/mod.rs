//! The policies of a group: what its configuration says, and what commands have changed of that. Pure but for the
//! file ([`store`]).
//!
//! A change says what it was made over. When the configuration says something else by the next start, somebody edited
//! it since, and that counts; else the change does. So an entry that was deleted or suspended stays so, and nobody
//! has to know which of two places is the newer one.

pub mod store;

use serde::{Deserialize, Serialize};

use crate::nearest::{did_you_mean, nearest};
use crate::policy::{BadPolicy, Policy, Table};

/// What a command did to an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Which.
    pub pattern: String,
    /// What the configuration said of it then.
    pub over: Option<Policy>,
    /// What it is since; nothing if it was deleted.
    pub now: Option<Policy>,
}

/// A change that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A further entry.
    Add(Policy),
    /// Other settings for an entry: names and values.
    Set(String, Vec<(String, String)>),
    /// Nothing is done by it for now (`true`), or it works again.
    Suspend(String, bool),
    /// One entry less.
    Delete(String),
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    configured: Vec<Policy>,
    changes: Vec<Change>,
    table: Table,
}

impl Policies {
    /// Those of the configuration, with what commands changed before.
    ///
    /// # Errors
    /// [`BadPolicy`] when the configuration makes no table. Changes that do not fit to it any more are left out, the
    /// newest first.
    pub fn new(configured: Vec<Policy>, mut changes: Vec<Change>) -> Result<Self, BadPolicy> {
        Table::new(configured.clone())?;
        changes.retain(|change| of(&configured, &change.pattern) == change.over.as_ref());
        loop {
            match Table::new(together(&configured, &changes)) {
                Ok(table) => return Ok(Self { configured, changes, table }),
                Err(error) => {
                    if changes.pop().is_none() {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// What holds.
    #[must_use]
    pub const fn table(&self) -> &Table {
        &self.table
    }

    /// What commands changed.
    #[must_use]
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// What the configuration says.
    #[must_use]
    pub fn configured(&self) -> &[Policy] {
        &self.configured
    }

    /// With a change.
    ///
    /// # Errors
    /// [`BadPolicy`].
    pub fn with(&self, ask: &Ask) -> Result<Self, BadPolicy> {
        let (pattern, now) = match ask {
            Ask::Add(policy) if of(self.table.policies(), &policy.pattern).is_some() => {
                let why = format!("{:?} has a policy already", policy.pattern);
                return Err(BadPolicy::new("pattern", why, "change it with `bfs-agent policy set`"));
            }
            Ask::Add(policy) => (policy.pattern.clone(), Some(policy.clone())),
            Ask::Set(pattern, settings) => {
                let mut policy = self.entry(pattern)?.clone();
                for (key, value) in settings {
                    policy.set(key, value)?;
                }
                (pattern.clone(), Some(policy))
            }
            Ask::Suspend(pattern, suspended) => {
                (pattern.clone(), Some(Policy { suspended: *suspended, ..self.entry(pattern)?.clone() }))
            }
            Ask::Delete(pattern) => {
                self.entry(pattern)?;
                (pattern.clone(), None)
            }
        };
        let over = of(&self.configured, &pattern).cloned();
        let mut changes = self.changes.clone();
        let was_here = changes.iter().position(|change| change.pattern == pattern);
        let change = Change { pattern, over, now };
        match was_here {
            // In its place: the order decides between patterns.
            Some(at) if change.now.is_some() && changes[at].now.is_some() => changes[at] = change,
            at => {
                if let Some(at) = at {
                    changes.remove(at);
                }
                // What is again as it was configured, or neither there nor configured, is no change.
                if change.now != change.over {
                    changes.push(change);
                }
            }
        }
        changes.retain(|change| change.now != change.over);
        let table = Table::new(together(&self.configured, &changes))?;
        Ok(Self { configured: self.configured.clone(), changes, table })
    }

    fn entry(&self, pattern: &str) -> Result<&Policy, BadPolicy> {
        of(self.table.policies(), pattern).ok_or_else(|| {
            let known: Vec<&str> =
                self.table.policies().iter().map(|policy| policy.pattern.as_str()).collect();
            let why = format!("{pattern:?} has no policy{}", did_you_mean(nearest(&known, pattern)));
            BadPolicy::new("pattern", why, "look at `bfs-agent policy list`")
        })
    }
}

fn of<'p>(policies: &'p [Policy], pattern: &str) -> Option<&'p Policy> {
    policies.iter().find(|policy| policy.pattern == pattern)
}

/// The entries of the configuration in their order, changed where they stand, and behind them what came by commands.
fn together(configured: &[Policy], changes: &[Change]) -> Vec<Policy> {
    let change = |pattern: &str| changes.iter().find(|change| change.pattern == pattern);
    let kept = configured.iter().filter_map(|policy| match change(&policy.pattern) {
        Some(change) => change.now.clone(),
        None => Some(policy.clone()),
    });
    let added = changes.iter().filter(|change| change.over.is_none()).filter_map(|change| change.now.clone());
    kept.chain(added).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Backup;
    use proptest::prelude::*;

    fn policy(pattern: &str, backup: Backup) -> Policy {
        Policy { backup, ..Policy::new(pattern).unwrap() }
    }

    fn shown(policies: &Policies) -> Vec<(String, Backup, bool)> {
        let each = policies.table().policies().iter();
        each.map(|policy| (policy.pattern.clone(), policy.backup, policy.suspended)).collect()
    }

    #[test]
    fn commands_change_what_the_configuration_says_until_that_changes() {
        let configured = vec![policy("/a", Backup::Write), policy("*.db", Backup::Close)];
        let policies = Policies::new(configured.clone(), Vec::new()).unwrap();
        let policies = policies.with(&Ask::Suspend("/a".into(), true)).unwrap();
        let policies = policies.with(&Ask::Add(policy("/b", Backup::Write))).unwrap();
        let policies = policies.with(&Ask::Delete("*.db".into())).unwrap();
        let wanted = [("/a".to_owned(), Backup::Write, true), ("/b".to_owned(), Backup::Write, false)];
        assert_eq!(shown(&policies), wanted);
        // The next start.
        let again = Policies::new(configured, policies.changes().to_vec()).unwrap();
        assert_eq!(shown(&again), wanted);
        // Somebody edited the one of "/a".
        let edited = vec![policy("/a", Backup::Close), policy("*.db", Backup::Close)];
        let again = Policies::new(edited, policies.changes().to_vec()).unwrap();
        assert_eq!(shown(&again)[0], ("/a".to_owned(), Backup::Close, false));
        assert_eq!(shown(&again).len(), 2, "the others are as they were left");
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_the_field() {
        let policies = Policies::new(vec![policy("/a", Backup::Write)], Vec::new()).unwrap();
        let refused = |ask: Ask| policies.with(&ask).unwrap_err();
        assert_eq!(refused(Ask::Add(policy("/a", Backup::Close))).field, "pattern");
        assert_eq!(refused(Ask::Delete("/b".into())).field, "pattern");
        assert!(refused(Ask::Suspend("/aa".into(), true)).why.contains("did you mean \"/a\""));
        let set = Ask::Set("/a".into(), vec![("backup".into(), "x".into())]);
        assert_eq!(refused(set).field, "backup");
    }

    #[derive(Clone, Debug)]
    enum Op {
        Add(u8, u8),
        Set(u8, u8),
        Suspend(u8, bool),
        Delete(u8),
        Restart,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..4u8, 0..3u8).prop_map(|(n, class)| Op::Add(n, class)),
            (0..4u8, 0..3u8).prop_map(|(n, class)| Op::Set(n, class)),
            (0..4u8, any::<bool>()).prop_map(|(n, suspended)| Op::Suspend(n, suspended)),
            (0..4u8).prop_map(Op::Delete),
            Just(Op::Restart),
        ]
    }

    proptest! {
        /// Whatever commands do, and whenever the agent starts anew, the entries are those that they left.
        #[test]
        fn what_commands_left_is_there(configured in prop::collection::btree_map(0..4u8, 0..3u8, 0..3), ops in prop::collection::vec(op(), 0..24)) {
            let configured: Vec<Policy> =
                configured.iter().map(|(n, class)| policy(&format!("/{n}"), Backup::ALL[*class as usize])).collect();
            let mut policies = Policies::new(configured.clone(), Vec::new()).unwrap();
            let mut model: std::collections::BTreeMap<String, (Backup, bool)> =
                configured.iter().map(|p| (p.pattern.clone(), (p.backup, false))).collect();
            for op in ops {
                let name = |n: u8| format!("/{n}");
                let (ask, fits) = match op {
                    Op::Add(n, class) => {
                        let new = policy(&name(n), Backup::ALL[class as usize]);
                        let fits = !model.contains_key(&name(n));
                        if fits { model.insert(name(n), (new.backup, false)); }
                        (Ask::Add(new), fits)
                    }
                    Op::Set(n, class) => {
                        let class = Backup::ALL[class as usize];
                        let fits = model.get_mut(&name(n)).map(|had| had.0 = class).is_some();
                        (Ask::Set(name(n), vec![("backup".into(), class.name().into())]), fits)
                    }
                    Op::Suspend(n, suspended) => {
                        let fits = model.get_mut(&name(n)).map(|had| had.1 = suspended).is_some();
                        (Ask::Suspend(name(n), suspended), fits)
                    }
                    Op::Delete(n) => (Ask::Delete(name(n)), model.remove(&name(n)).is_some()),
                    Op::Restart => {
                        policies = Policies::new(configured.clone(), policies.changes().to_vec()).unwrap();
                        continue;
                    }
                };
                match policies.with(&ask) {
                    Ok(next) => { prop_assert!(fits, "{ask:?}"); policies = next; }
                    Err(_) => prop_assert!(!fits, "{ask:?}"),
                }
                let mut found = shown(&policies);
                found.sort_by(|a, b| a.0.cmp(&b.0));
                let wanted: Vec<_> = model.iter().map(|(p, (b, s))| (p.clone(), *b, *s)).collect();
                prop_assert_eq!(found, wanted);
            }
        }
    }
}
