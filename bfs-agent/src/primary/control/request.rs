//! What programs and commands ask of an agent: a line with one JSON object each. Pure.
//!
//! Reading one is strict, because a field that is passed over in silence is one that somebody relied on: fields that
//! are not known, given twice or of another form are refused, with the name of the field and what is wrong.
//! docs/interface.md is the same for those who write programs.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::policies::PolicySettings;
use crate::generation::At;
use crate::nearest::{did_you_mean, nearest};
use crate::net::Destination;

/// How long is waited where the request does not say.
const TIMEOUT_MS: u64 = 60_000;
/// The same for what reads all files.
const LONG_TIMEOUT_MS: u64 = 600_000;
/// Longest time that can be asked for: a year.
const TIMEOUT_MS_MAX: u64 = 365 * 24 * 3_600_000;
/// Longest tag.
const TAG_BYTES_MAX: usize = 255;
/// Beyond what a request allows, for the agent to answer.
pub(super) const GRACE: Duration = Duration::from_secs(30);

/// A state of a checkpoint that can be waited for, in order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// Its instant is behind us: nothing that happens from now on will be in it.
    Taken,
    /// All its records are durable somewhere.
    Sealed,
    /// Durable on the backup.
    #[default]
    Confirmed,
    /// The backup's files are as at the checkpoint.
    Applied,
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// How does it stand? Answered by [`Reply::Status`](super::Reply::Status).
    Status,
    /// Take a checkpoint. Answered by [`Reply::Checkpoint`](super::Reply::Checkpoint) when `wait` is reached.
    Checkpoint {
        /// The user's tag, empty for none.
        tag: String,
        /// Which state to wait for.
        wait: WaitFor,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// Stop the selected processes, take a checkpoint, answer [`Reply::Standing`](super::Reply::Standing), let them
    /// go at [`Inbound::Go`](super::Inbound::Go), and answer [`Reply::Checkpoint`](super::Reply::Checkpoint) when
    /// `wait` is reached.
    CheckpointStopped {
        /// The user's tag, empty for none.
        tag: String,
        /// Which state to wait for after they go on.
        wait: WaitFor,
        /// How long to wait, altogether.
        timeout_ms: u64,
        /// They stand no longer than this, whatever happens.
        limit_ms: u64,
    },
    /// Something changed that capture may not have seen: it is read before the next checkpoint. Answered by
    /// [`Reply::Reported`](super::Reply::Reported) when that cannot be forgotten any more.
    ReportUpdate {
        /// The file or directory; its names are read, too, so it may be new or gone.
        path: PathBuf,
        /// Where the change begins.
        #[serde(skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// How many bytes it has; without it, all from `offset` on.
        #[serde(skip_serializing_if = "Option::is_none")]
        length: Option<u64>,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// Bring back one file, as it was in a checkpoint that is kept. Answered by
    /// [`Reply::Recovered`](super::Reply::Recovered) when it stands there durably, and the agent cannot forget that.
    Recover {
        /// The file; it may be gone.
        path: PathBuf,
        /// Which checkpoint: its number, `tag:NAME`, or a time; the newest if that is left out. Or [`NEWEST`]: what was
        /// captured last, in place, which a policy has to allow; answered by
        /// [`Reply::BroughtBack`](super::Reply::BroughtBack).
        #[serde(skip_serializing_if = "Option::is_none")]
        at: Option<String>,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// Go back to a checkpoint that has process state, with files and processes. Answered by
    /// [`Reply::WentBack`](super::Reply::WentBack) when the processes run again.
    GoBack {
        /// Which checkpoint: its number, `tag:NAME`, or a time; the newest if that is left out.
        #[serde(skip_serializing_if = "Option::is_none")]
        at: Option<String>,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// Send everything that is captured. Answered by [`Reply::Flushed`](super::Reply::Flushed).
    Flush {
        /// How long to wait.
        timeout_ms: u64,
    },
    /// Take a checkpoint, wait until it is applied, compare. Answered by [`Reply::Verified`](super::Reply::Verified).
    Verify {
        /// How long, altogether.
        timeout_ms: u64,
        /// Put back what others changed in the backup, and send again what differs.
        repair: bool,
    },
    /// Replicate a further subtree. Answered by [`Reply::Checkpoint`](super::Reply::Checkpoint) when one that has
    /// it is confirmed.
    PathAdd {
        /// The directory.
        path: PathBuf,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// Replicate a subtree no longer. Answered by [`Reply::Checkpoint`](super::Reply::Checkpoint) when one without
    /// it is confirmed.
    PathRemove {
        /// The directory.
        path: PathBuf,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// A further destination, which gets each checkpoint as a whole. Answered like all changes of destinations by
    /// [`Reply::Destinations`](super::Reply::Destinations), at once.
    DestAdd {
        /// As it would be given to `--backup`.
        address: String,
    },
    /// One destination less; what it has it keeps.
    DestRemove {
        /// Which.
        address: String,
    },
    /// Nothing more is sent there until it is resumed.
    DestPause {
        /// Which.
        address: String,
    },
    /// It goes on where it stands.
    DestResume {
        /// Which.
        address: String,
    },
    /// It is looked at anew what it has, and it is brought to what the others have.
    DestResync {
        /// Which.
        address: String,
    },
    /// Which policies hold? Answered by [`Reply::Policies`](super::Reply::Policies).
    PolicyList,
    /// A further policy. Answered like all changes by [`Reply::Policies`](super::Reply::Policies), when it is durable.
    PolicyAdd {
        /// Which files.
        pattern: String,
        /// What is not the default.
        #[serde(flatten)]
        settings: PolicySettings,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// Other settings for a policy.
    PolicySet {
        /// Which.
        pattern: String,
        /// What changes.
        #[serde(flatten)]
        settings: PolicySettings,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// Nothing is done by a policy until it is resumed; its followers stay as they are.
    PolicySuspend {
        /// Which.
        pattern: String,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// A policy works again, and its followers get a new copy.
    PolicyResume {
        /// Which.
        pattern: String,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// One policy less; its followers go.
    PolicyDelete {
        /// Which.
        pattern: String,
        /// How long, altogether.
        timeout_ms: u64,
    },
    /// End the selected processes, and then do as for [`Request::Stop`]: the backup can be promoted, and nothing is lost.
    Switchover {
        /// How long, altogether.
        timeout_ms: u64,
        /// Send them SIGTERM; else they are waited for.
        signal: bool,
        /// Kill those that have not ended 5 s later.
        kill: bool,
    },
    /// Take a last checkpoint, wait for it, and end. Answered by [`Reply::Ended`](super::Reply::Ended), as late as
    /// possible.
    Stop {
        /// How long to wait for the last checkpoint.
        timeout_ms: u64,
    },
}

/// Of [`Request::Recover`]: no checkpoint, but what was captured last.
pub const NEWEST: &str = "newest";

/// The names of all requests.
const KNOWN: [&str; 23] = [
    "status",
    "checkpoint",
    "checkpoint_stopped",
    "report_update",
    "recover",
    "go_back",
    "flush",
    "verify",
    "path_add",
    "path_remove",
    "dest_add",
    "dest_remove",
    "dest_pause",
    "dest_resume",
    "dest_resync",
    "policy_list",
    "policy_add",
    "policy_set",
    "policy_suspend",
    "policy_resume",
    "policy_delete",
    "switchover",
    "stop",
];

/// Why a line asks nothing that can be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRequest {
    /// The field that is to blame, if it is one.
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub hint: String,
    /// There is no such request.
    pub is_unknown: bool,
}

impl BadRequest {
    /// The line as a whole is wrong.
    pub(super) fn line(message: impl Into<String>) -> Self {
        let hint = "write one JSON object in one line, like {\"request\":\"status\"}".into();
        Self { field: None, message: message.into(), hint, is_unknown: false }
    }

    /// A field is wrong.
    #[must_use]
    pub fn field(field: &str, why: impl fmt::Display, hint: impl Into<String>) -> Self {
        let message = format!("{field}: {why}");
        Self { field: Some(field.into()), message, hint: hint.into(), is_unknown: false }
    }
}

impl Request {
    /// Reads a line, without its end.
    ///
    /// # Errors
    /// [`BadRequest`].
    pub fn parse(line: &[u8]) -> Result<Self, BadRequest> {
        let text = std::str::from_utf8(line).map_err(|e| {
            BadRequest::line(format!("byte {} of the line is not UTF-8", e.valid_up_to() + 1))
        })?;
        if text.trim().is_empty() {
            return Err(BadRequest::line("the line is empty"));
        }
        let mut fields: Fields =
            serde_json::from_str(text).map_err(|e| BadRequest::line(format!("it is not a request: {e}")))?;
        if let Some(twice) = fields.twice.take() {
            return Err(BadRequest::field(&twice, "it is given twice", "give it once"));
        }
        let Some(name) = fields.optional::<String>("request")? else {
            return Err(BadRequest::field("request", "it is missing", known()));
        };
        let request = match name.as_str() {
            "status" => Self::Status,
            "checkpoint" => Self::Checkpoint {
                tag: fields.tag()?,
                wait: fields.wait()?,
                timeout_ms: fields.time("timeout_ms", TIMEOUT_MS)?,
            },
            "checkpoint_stopped" => Self::CheckpointStopped {
                tag: fields.tag()?,
                wait: fields.wait()?,
                timeout_ms: fields.time("timeout_ms", TIMEOUT_MS)?,
                limit_ms: fields.time("limit_ms", TIMEOUT_MS)?,
            },
            "report_update" => fields.update()?,
            "recover" => Self::Recover {
                path: fields.path()?,
                at: fields.at(Some(NEWEST))?,
                timeout_ms: fields.time("timeout_ms", LONG_TIMEOUT_MS)?,
            },
            "go_back" => {
                Self::GoBack { at: fields.at(None)?, timeout_ms: fields.time("timeout_ms", LONG_TIMEOUT_MS)? }
            }
            "flush" => Self::Flush { timeout_ms: fields.time("timeout_ms", TIMEOUT_MS)? },
            "verify" => Self::Verify {
                timeout_ms: fields.time("timeout_ms", LONG_TIMEOUT_MS)?,
                repair: fields.optional("repair")?.unwrap_or_default(),
            },
            "path_add" => Self::PathAdd {
                path: fields.path()?,
                timeout_ms: fields.time("timeout_ms", LONG_TIMEOUT_MS)?,
            },
            "path_remove" => Self::PathRemove {
                path: fields.path()?,
                timeout_ms: fields.time("timeout_ms", LONG_TIMEOUT_MS)?,
            },
            "dest_add" => Self::DestAdd { address: fields.address()? },
            "dest_remove" => Self::DestRemove { address: fields.address()? },
            "dest_pause" => Self::DestPause { address: fields.address()? },
            "dest_resume" => Self::DestResume { address: fields.address()? },
            "dest_resync" => Self::DestResync { address: fields.address()? },
            "policy_list" => Self::PolicyList,
            "policy_add" | "policy_set" => {
                let pattern = fields.pattern()?;
                let settings = fields.settings(&pattern)?;
                let timeout_ms = fields.time("timeout_ms", TIMEOUT_MS)?;
                match name.as_str() {
                    "policy_add" => Self::PolicyAdd { pattern, settings, timeout_ms },
                    _ => Self::PolicySet { pattern, settings, timeout_ms },
                }
            }
            "policy_suspend" | "policy_resume" | "policy_delete" => {
                let pattern = fields.pattern()?;
                let timeout_ms = fields.time("timeout_ms", TIMEOUT_MS)?;
                match name.as_str() {
                    "policy_suspend" => Self::PolicySuspend { pattern, timeout_ms },
                    "policy_resume" => Self::PolicyResume { pattern, timeout_ms },
                    _ => Self::PolicyDelete { pattern, timeout_ms },
                }
            }
            "switchover" => Self::Switchover {
                timeout_ms: fields.time("timeout_ms", TIMEOUT_MS)?,
                signal: fields.optional("signal")?.unwrap_or(true),
                kill: fields.optional("kill")?.unwrap_or_default(),
            },
            "stop" => Self::Stop { timeout_ms: fields.time("timeout_ms", TIMEOUT_MS)? },
            _ => {
                let near = did_you_mean(nearest(&KNOWN, &name));
                let why = format!("{name:?} is not known{near}");
                return Err(BadRequest { is_unknown: true, ..BadRequest::field("request", why, known()) });
            }
        };
        fields.end(&name)?;
        Ok(request)
    }

    /// How long the agent may take to answer, and how long processes may stand.
    pub(super) fn limits(&self) -> (Duration, Duration) {
        match self {
            Self::Status
            | Self::PolicyList
            | Self::DestAdd { .. }
            | Self::DestRemove { .. }
            | Self::DestPause { .. }
            | Self::DestResume { .. }
            | Self::DestResync { .. } => (GRACE, GRACE),
            Self::Checkpoint { timeout_ms, .. }
            | Self::ReportUpdate { timeout_ms, .. }
            | Self::Recover { timeout_ms, .. }
            | Self::GoBack { timeout_ms, .. }
            | Self::Stop { timeout_ms }
            | Self::Switchover { timeout_ms, .. }
            | Self::Flush { timeout_ms }
            | Self::PathAdd { timeout_ms, .. }
            | Self::PathRemove { timeout_ms, .. }
            | Self::PolicyAdd { timeout_ms, .. }
            | Self::PolicySet { timeout_ms, .. }
            | Self::PolicySuspend { timeout_ms, .. }
            | Self::PolicyResume { timeout_ms, .. }
            | Self::PolicyDelete { timeout_ms, .. }
            | Self::Verify { timeout_ms, .. } => (Duration::from_millis(*timeout_ms) + GRACE, GRACE),
            Self::CheckpointStopped { timeout_ms, limit_ms, .. } => {
                let stand = Duration::from_millis((*limit_ms).max(1));
                (Duration::from_millis(*timeout_ms) + stand + GRACE, stand)
            }
        }
    }
}

fn known() -> String {
    format!("known are {}", KNOWN.join(", "))
}

/// The fields of an object that were not taken yet.
#[derive(Default)]
pub(super) struct Fields {
    left: Vec<(String, Value)>,
    /// Names that were asked for: what the request can have.
    asked: Vec<&'static str>,
    /// The first name that came twice, which JSON allows and nobody means.
    twice: Option<String>,
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Fields::default();
                while let Some((name, value)) = map.next_entry::<String, Value>()? {
                    if fields.left.iter().any(|(known, _)| *known == name) {
                        fields.twice.get_or_insert(name);
                    } else {
                        fields.left.push((name, value));
                    }
                }
                Ok(fields)
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Fields {
    pub(super) fn optional<T: DeserializeOwned>(
        &mut self,
        name: &'static str,
    ) -> Result<Option<T>, BadRequest> {
        self.asked.push(name);
        let Some(at) = self.left.iter().position(|(known, _)| known == name) else { return Ok(None) };
        let value = self.left.swap_remove(at).1;
        let read = serde_json::from_value(value);
        read.map(Some).map_err(|e| BadRequest::field(name, e, "docs/interface.md says what it can be"))
    }

    fn tag(&mut self) -> Result<String, BadRequest> {
        let tag: String = self.optional("tag")?.unwrap_or_default();
        if tag.len() > TAG_BYTES_MAX {
            let why = format!("it has {} bytes", tag.len());
            return Err(BadRequest::field("tag", why, format!("give at most {TAG_BYTES_MAX}")));
        }
        if tag.chars().any(char::is_control) {
            return Err(BadRequest::field("tag", "it has a control character", "give a name in one line"));
        }
        Ok(tag)
    }

    fn wait(&mut self) -> Result<WaitFor, BadRequest> {
        Ok(self.optional("wait")?.unwrap_or_default())
    }

    fn time(&mut self, name: &'static str, default: u64) -> Result<u64, BadRequest> {
        let ms = self.optional(name)?.unwrap_or(default);
        if ms > TIMEOUT_MS_MAX {
            let why = format!("{ms} milliseconds are more than a year");
            return Err(BadRequest::field(name, why, "give less"));
        }
        Ok(ms)
    }

    fn address(&mut self) -> Result<String, BadRequest> {
        let hint = "give it as it is given to --backup";
        let Some(address) = self.optional::<String>("address")? else {
            return Err(BadRequest::field("address", "it is missing", hint));
        };
        match address.parse::<Destination>() {
            Ok(known) => Ok(known.to_string()),
            Err(why) => Err(BadRequest::field("address", why, hint)),
        }
    }

    fn path(&mut self) -> Result<PathBuf, BadRequest> {
        let Some(path) = self.optional::<PathBuf>("path")? else {
            return Err(BadRequest::field("path", "it is missing", "give an absolute path"));
        };
        // The agent has another working directory, and the kernel takes no zero in a path.
        if !path.is_absolute() {
            return Err(BadRequest::field("path", "it is not absolute", "give an absolute path"));
        }
        if path.to_string_lossy().contains('\0') {
            return Err(BadRequest::field("path", "it has a zero in it", "give a path that can be"));
        }
        Ok(path)
    }

    /// A checkpoint, or this word.
    fn at(&mut self, or: Option<&str>) -> Result<Option<String>, BadRequest> {
        let text = match self.optional::<Value>("at")? {
            None => return Ok(None),
            Some(Value::String(text)) => text,
            Some(other) => other.to_string(),
        };
        let hint = "docs/interface.md says what it can be";
        if or == Some(text.as_str()) {
            return Ok(Some(text));
        }
        text.parse::<At>().map_err(|why| BadRequest::field("at", why, hint))?;
        Ok(Some(text))
    }

    fn update(&mut self) -> Result<Request, BadRequest> {
        let path = self.path()?;
        let offset: Option<u64> = self.optional("offset")?;
        let length: Option<u64> = self.optional("length")?;
        if length == Some(0) {
            let hint = "leave it out for all that follows offset";
            return Err(BadRequest::field("length", "it is 0: nothing would be read", hint));
        }
        let end = offset.unwrap_or(0).checked_add(length.unwrap_or(0));
        if end.is_none_or(|end| end > i64::MAX as u64) {
            let field = if length.is_some() { "length" } else { "offset" };
            return Err(BadRequest::field(
                field,
                "it ends beyond what a file can have",
                "give what was written",
            ));
        }
        Ok(Request::ReportUpdate { path, offset, length, timeout_ms: self.time("timeout_ms", TIMEOUT_MS)? })
    }

    /// Whatever is left nobody knows.
    fn end(self, request: &str) -> Result<(), BadRequest> {
        let Some((name, _)) = self.left.first() else { return Ok(()) };
        let near = did_you_mean(nearest(&self.asked, name));
        let why = format!("there is no such field in {request}{near}");
        Err(BadRequest::field(name, why, format!("it has {}", self.asked.join(", "))))
    }
}

#[cfg(test)]
mod tests;
