//! The requests about policies: their fields, read as strictly as those of any other request. Pure.

use serde::{Deserialize, Serialize};

use super::request::{BadRequest, Fields};
use crate::policy::{BadPolicy, Policy};

/// Settings that a request gives; what is left out stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySettings {
    /// Class of backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<String>,
    /// Class of recovery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<String>,
    /// How often a copy is tried again that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
    /// How long a copy may take, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_limit_ms: Option<u64>,
    /// Where the follower stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
}

impl PolicySettings {
    /// Names and values of those that are given.
    #[must_use]
    pub fn pairs(&self) -> Vec<(String, String)> {
        let all = [
            ("backup", self.backup.clone()),
            ("recovery", self.recovery.clone()),
            ("retries", self.retries.map(|n| n.to_string())),
            ("time_limit_ms", self.time_limit_ms.map(|n| n.to_string())),
            ("place", self.place.clone()),
        ];
        all.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// The policy that a pattern has with them.
    ///
    /// # Errors
    /// [`BadPolicy`].
    pub fn policy(&self, pattern: &str) -> Result<Policy, BadPolicy> {
        let mut policy = Policy::new(pattern)?;
        self.pairs().iter().try_for_each(|(key, value)| policy.set(key, value))?;
        Ok(policy)
    }
}

impl From<BadPolicy> for BadRequest {
    fn from(bad: BadPolicy) -> Self {
        Self::field(&bad.field, bad.why, bad.hint)
    }
}

impl Fields {
    pub(super) fn pattern(&mut self) -> Result<String, BadRequest> {
        let pattern: Option<String> = self.optional("pattern")?;
        let pattern = pattern.ok_or_else(|| {
            BadRequest::field("pattern", "it is missing", "give the path or the pattern of the policy")
        })?;
        Policy::new(&pattern)?;
        Ok(pattern)
    }

    /// The settings, each of which could stand in a policy.
    pub(super) fn settings(&mut self, pattern: &str) -> Result<PolicySettings, BadRequest> {
        let settings = PolicySettings {
            backup: self.optional("backup")?,
            recovery: self.optional("recovery")?,
            retries: self.optional("retries")?,
            time_limit_ms: self.optional("time_limit_ms")?,
            place: self.optional("place")?,
        };
        settings.policy(pattern)?;
        Ok(settings)
    }
}
