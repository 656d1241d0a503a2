//! The commands that tests give to the agent, and reading what it says.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{World, binary};
use crate::watch::{SOON, until};

/// The first number that stands anywhere in the JSON under one of these names, itself or as the
/// `number` of what stands there.
#[must_use]
pub fn number_named(value: &Value, names: &[&str]) -> Option<u64> {
    match value {
        Value::Object(map) => names
            .iter()
            .find_map(|name| {
                let there = map.get(*name)?;
                there.as_u64().or_else(|| there.get("number")?.as_u64())
            })
            .or_else(|| map.values().find_map(|inner| number_named(inner, names))),
        Value::Array(list) => list.iter().find_map(|inner| number_named(inner, names)),
        _ => None,
    }
}

/// The last number in a text: what `checkpoint` prints.
#[must_use]
pub fn number_in(text: &str) -> Option<u64> {
    text.split(|c: char| !c.is_ascii_digit()).rfind(|part| !part.is_empty())?.parse().ok()
}

/// What the agent says that it could not capture the usual way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// Events that found no room in the ring; each names its object.
    pub events: u64,
    /// Times when not even that could be named.
    pub rescans: u64,
}

impl World {
    /// What found no room until now.
    ///
    /// # Errors
    /// When the agent does not say it.
    pub fn dropped(&self) -> Result<Dropped> {
        let status = self.status()?;
        let counter = |name| number_named(&status["counters"], &[name]).with_context(|| format!("no {name}"));
        Ok(Dropped { events: counter("reserve_failed")?, rescans: counter("rescan")? })
    }

    /// Starts `bfs-agent VERB --group GROUP REST...` with pipes.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_agent_command(&self, words: &[&str]) -> Result<std::process::Child> {
        let mut command = self.agent_line(words);
        self.leash.hold(&mut command)?.spawn().context("bfs-agent does not start")
    }

    /// Starts `bfs-replayer WORDS...`; what it prints goes into a log.
    ///
    /// # Errors
    /// When it does not start.
    pub fn spawn_replayer_command(&self, words: &[&str]) -> Result<std::process::Child> {
        let mut command = Command::new(binary("bfs-replayer"));
        command.args(words).stdin(Stdio::null());
        command.stdout(self.log("replayer-commands.log")?).stderr(self.log("replayer-commands.log")?);
        self.leash.hold(&mut command)?.spawn().context("bfs-replayer does not start")
    }

    pub(super) fn agent_line(&self, words: &[&str]) -> Command {
        let mut command = Command::new(binary("bfs-agent"));
        // These have commands of their own.
        let verbs = if matches!(words[0], "dest" | "path" | "policy") { 2 } else { 1 };
        command.args(&words[..verbs]).args(["--group", &self.group]).args(&words[verbs..]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Starts a mount of a checkpoint.
    ///
    /// # Errors
    /// When it does not start.
    pub fn mount_checkpoint(&self, number: u64, at: &Path) -> Result<std::process::Child> {
        let mut command = self.daemon("bfs-replayer")?;
        command.args(["mount", "--group", &self.group, "--at", &number.to_string(), "--store"]);
        command.args([self.store.as_path(), at]).stdin(Stdio::null());
        Ok(command.stdout(self.log("mount.log")?).stderr(self.log("mount.log")?).spawn()?)
    }

    /// What the replayer itself says of the group.
    ///
    /// # Errors
    /// When it does not answer or does not know the group.
    pub fn replayer_status(&self) -> Result<Value> {
        let mut command = Command::new(binary("bfs-replayer"));
        command.args(["status", "--json", "--store"]).arg(&self.store);
        let done = super::command_ok(self.leash.hold(&mut command)?)?;
        let groups: Value = serde_json::from_slice(&done.stdout).context("not JSON")?;
        let groups = groups.as_array().context("not a list of groups")?;
        let own = groups.iter().find(|g| g["group"].as_str() == Some(&self.group));
        own.cloned().with_context(|| format!("no group {} in {groups:?}", self.group))
    }

    /// The same, to its end. A command that does not end is killed and an error.
    ///
    /// # Errors
    /// When it does not start or does not end.
    pub fn agent_command(&self, words: &[&str], limit: Duration) -> Result<Output> {
        let mut child = self.spawn_agent_command(words)?;
        // Readers of their own: a full pipe would stop the command.
        let out = reader(child.stdout.take().expect("piped"));
        let err = reader(child.stderr.take().expect("piped"));
        let ended = until(&format!("bfs-agent {words:?}"), limit, || child.try_wait().transpose());
        if ended.is_err() {
            child.kill()?;
            child.wait()?;
        }
        let (stdout, stderr) =
            (out.join().expect("readers do not panic"), err.join().expect("readers do not panic"));
        let status = ended.with_context(|| format!("it said {:?}", String::from_utf8_lossy(&stderr)))??;
        Ok(Output { status, stdout, stderr })
    }

    fn succeeded(&self, words: &[&str], limit: Duration) -> Result<String> {
        let done = self.agent_command(words, limit)?;
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        ensure!(done.status.success(), "bfs-agent {words:?}: {}: {out}{err}", done.status);
        Ok(out.into_owned())
    }

    /// What the agent says of the group.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn status(&self) -> Result<Value> {
        let text = self.succeeded(&["status", "--json"], Duration::from_secs(30))?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// A number from the status, by the first of these names that is there.
    ///
    /// # Errors
    /// When there is none.
    pub fn status_number(&self, names: &[&str]) -> Result<u64> {
        let status = self.status()?;
        number_named(&status, names).with_context(|| format!("none of {names:?} in {status}"))
    }

    /// Takes a checkpoint and waits until it is applied; its number.
    ///
    /// # Errors
    /// When it is not applied.
    pub fn checkpoint(&self) -> Result<u64> {
        self.checkpoint_until("applied")
    }

    /// The command that runs a script of the shell, with what is replicated as `$1` and what lies beside it as `$2`.
    #[must_use]
    pub fn script(&self, script: &str) -> Vec<String> {
        let [data, aux] = [&self.place.data, &self.place.aux].map(|place| place.display().to_string());
        ["/bin/sh", "-c", script, "sh", &data, &aux].map(str::to_owned).to_vec()
    }

    /// Takes a checkpoint and waits until it is `sealed`, `confirmed` or `applied`; its number.
    ///
    /// # Errors
    /// When it is not.
    pub fn checkpoint_until(&self, state: &str) -> Result<u64> {
        let said = self.succeeded(&["checkpoint", "--wait", state, "--timeout", &soon()], SOON * 2)?;
        number_in(&said).with_context(|| format!("no checkpoint number in {said:?}"))
    }

    /// Stops the program, takes a checkpoint, runs `command`, lets the program go, and waits until
    /// the checkpoint is applied; its number.
    ///
    /// # Errors
    /// When the command fails or the checkpoint is not applied.
    pub fn checkpoint_stopped(&self, command: &[String]) -> Result<u64> {
        let limit = soon();
        let mut words = vec!["checkpoint", "--wait", "applied", "--timeout", &limit, "--stopped", "--"];
        words.extend(command.iter().map(String::as_str));
        let said = self.succeeded(&words, SOON * 2)?;
        let number = number_in(&said).with_context(|| format!("no checkpoint number in {said:?}"))?;
        self.wait_applied(number)?;
        Ok(number)
    }

    /// Waits until the checkpoint is applied.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_applied(&self, number: u64) -> Result<()> {
        until(&format!("checkpoint {number} to be applied"), SOON, || {
            self.status_number(&["applied"]).ok().filter(|applied| *applied >= number)
        })
        .map(drop)
    }
}

fn reader(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What could be read before an error is what there is to show.
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// [`SOON`], as the command line takes it.
fn soon() -> String {
    format!("{}s", SOON.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_where_they_stand() {
        let status: Value = serde_json::from_str(r#"{"group":"g","destinations":[{"applied":7}]}"#).unwrap();
        assert_eq!(number_named(&status, &["nothing", "applied"]), Some(7));
        assert_eq!(number_named(&status, &["confirmed"]), None);
        let status: Value = serde_json::from_str(r#"{"applied":{"number":3,"tag":""}}"#).unwrap();
        assert_eq!(number_named(&status, &["applied"]), Some(3));
        assert_eq!(number_in("checkpoint 12\n"), Some(12));
        assert_eq!(number_in("none\n"), None);
    }
}
