//! The configuration file of the agent: groups, each with what `run` or `attach` would be told.
//!
//! A group becomes a command line, so each setting means what its option means, is checked by the same code, and
//! there is nothing that only a file can say. Unknown keys are refused, with the known one that is nearest. Pure
//! but for reading the file.

use std::ffi::OsString;
use std::path::Path;

use toml::{Table, Value};

use crate::nearest::{did_you_mean, nearest};

/// What a value has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// A text.
    Text,
    /// A list of texts, at least one.
    Texts,
    /// A text, or a list of them.
    TextOrTexts,
    /// True or false: an option without a value.
    Flag,
    /// A number of a process, or a list of them.
    Numbers,
    /// A table: from = to.
    Map,
    /// A text as for `--checkpoint`, or a table of its words.
    When,
    /// A list of tables: `match`, and the settings of a policy.
    Policies,
}

/// A key of a group, and the option that it stands for.
struct Key {
    name: &'static str,
    option: &'static str,
    form: Form,
}

const fn key(name: &'static str, option: &'static str, form: Form) -> Key {
    Key { name, option, form }
}

/// What a group may say, beside `run`.
const KEYS: [Key; 39] = [
    key("paths", "--path", Form::Texts),
    key("backup", "--backup", Form::TextOrTexts),
    key("confirm", "--confirm", Form::Text),
    key("keys", "--keys", Form::Text),
    key("exclude", "--exclude", Form::Texts),
    key("include", "--include", Form::Texts),
    key("maps", "--map", Form::Map),
    key("checkpoint", "--checkpoint", Form::When),
    key("final_wait", "--final-wait", Form::Text),
    key("foreign", "--foreign", Form::Text),
    key("before_checkpoint", "--before-checkpoint", Form::Text),
    key("after_checkpoint", "--after-checkpoint", Form::Text),
    key("hook_limit", "--hook-limit", Form::Text),
    key("policy", "--policy", Form::Policies),
    key("policies", "--policies", Form::Text),
    key("alert", "--alert", Form::Text),
    key("alert_after", "--alert-after", Form::Text),
    key("metrics", "--metrics", Form::Text),
    key("socket", "--socket", Form::Text),
    key("spool", "--spool", Form::Text),
    key("spool_size", "--spool-size", Form::Text),
    key("spool_time", "--spool-time", Form::Text),
    key("rate_limit", "--rate-limit", Form::Text),
    key("compress", "--compress", Form::Flag),
    key("pid", "--pid", Form::Numbers),
    key("cgroup", "--cgroup", Form::Text),
    key("everyone", "--everyone", Form::Flag),
    key("resume", "--resume", Form::Flag),
    key("rollback_on_failure", "--rollback-on-failure", Form::Flag),
    key("kill_descendants", "--kill-descendants", Form::Flag),
    key("include_foreign", "--include-foreign", Form::Flag),
    key("with_process", "--with-process", Form::Flag),
    key("criu", "--criu", Form::Text),
    key("restart_on_abort", "--restart-on-abort", Form::Numbers),
    key("process_keep", "--process-keep", Form::Numbers),
    key("process_ahead", "--process-ahead", Form::Numbers),
    key("process_dir", "--process-dir", Form::Text),
    key("process_overrun", "--process-overrun", Form::Text),
    key("process_failure", "--process-failure", Form::Text),
];

/// Keys that belong to `run`.
const OF_RUN: [&str; 4] = ["rollback_on_failure", "kill_descendants", "include_foreign", "restart_on_abort"];
/// Keys that belong to `attach`.
const OF_ATTACH: [&str; 4] = ["pid", "cgroup", "everyone", "resume"];
/// One of them says whom to attach to.
const WHOM: [&str; 3] = ["pid", "cgroup", "everyone"];
/// Keys of a policy.
const OF_POLICY: [&str; 6] = ["match", "backup", "recovery", "retries", "time_limit", "place"];
/// Words of `--checkpoint`.
const WHEN: [&str; 4] = ["every", "bytes", "ops", "cron"];

/// The names of all keys of a group.
#[cfg(test)]
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    KEYS.iter().map(|key| key.name).chain(["run"])
}

/// Why a file says nothing that can be done.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// It is not TOML.
    #[error("{0}")]
    Syntax(toml::de::Error),
    /// A key that nobody knows.
    #[error("{at}: there is no {key:?}{}", did_you_mean(*.near))]
    Unknown {
        /// Where.
        at: String,
        /// The key.
        key: String,
        /// The known one that is nearest.
        near: Option<&'static str>,
    },
    /// A value of the wrong form.
    #[error("{at}: {key} must be {form}")]
    Form {
        /// Where.
        at: String,
        /// The key.
        key: String,
        /// What it must be.
        form: &'static str,
    },
    /// Something is missing, or two things contradict each other.
    #[error("{at}: {why}")]
    Group {
        /// Where.
        at: String,
        /// What is wrong.
        why: String,
    },
}

/// A group of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigGroup {
    /// Its name.
    pub name: String,
    /// The arguments of `bfs-agent` that say the same.
    pub arguments: Vec<OsString>,
    /// It says `resume`.
    pub resumes: bool,
}

/// Reads a file.
///
/// # Errors
/// [`ConfigError`].
pub fn read(path: &Path) -> Result<Vec<ConfigGroup>, ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|error| ConfigError::Read { path: path.into(), error })?;
    parse(&text)
}

/// The groups of a file, in the order of their names.
///
/// # Errors
/// [`ConfigError`].
pub fn parse(text: &str) -> Result<Vec<ConfigGroup>, ConfigError> {
    let file: Table = text.parse().map_err(ConfigError::Syntax)?;
    let mut groups = Vec::new();
    for (key, value) in &file {
        if key != "group" {
            return Err(unknown("the file", key, &["group"]));
        }
        let Value::Table(named) = value else {
            return Err(form("the file", "group", "tables: [group.NAME]"));
        };
        for (name, value) in named {
            let at = format!("group {name:?}");
            let Value::Table(table) = value else { return Err(form(&at, "it", "a table: [group.NAME]")) };
            let arguments = arguments(name, table, &at)?;
            let resumes = table.get("resume").and_then(Value::as_bool).unwrap_or(false);
            groups.push(ConfigGroup { name: name.clone(), arguments, resumes });
        }
    }
    if groups.is_empty() {
        let why = "it has no group: write [group.NAME]".to_owned();
        return Err(ConfigError::Group { at: "the file".into(), why });
    }
    Ok(groups)
}

fn unknown(at: &str, key: &str, known: &[&'static str]) -> ConfigError {
    ConfigError::Unknown { at: at.into(), key: key.into(), near: nearest(known, key) }
}

fn form(at: &str, key: &str, form: &'static str) -> ConfigError {
    ConfigError::Form { at: at.into(), key: key.into(), form }
}

fn arguments(name: &str, table: &Table, at: &str) -> Result<Vec<OsString>, ConfigError> {
    let wrong = |why: String| ConfigError::Group { at: at.into(), why };
    let known: Vec<&'static str> = KEYS.iter().map(|key| key.name).chain(["run"]).collect();
    let run = table.get("run").map(|value| texts(at, "run", value)).transpose()?;
    let mut words: Vec<String> = vec![if run.is_some() { "run" } else { "attach" }.into()];
    words.extend(["--group".into(), name.into()]);
    for (key, value) in table {
        if key == "run" {
            continue;
        }
        let Some(known) = KEYS.iter().find(|known| known.name == key) else {
            return Err(unknown(at, key, &known));
        };
        let other = if run.is_some() { &OF_ATTACH[..] } else { &OF_RUN[..] };
        if other.contains(&known.name) {
            let with = if run.is_some() { "does not go together with" } else { "needs" };
            return Err(wrong(format!("{key} {with} run")));
        }
        for value in values(known, value, at)? {
            // One word, so that a value that begins with a dash is none of its own.
            words
                .push(value.map_or_else(|| known.option.into(), |value| format!("{}={value}", known.option)));
        }
    }
    for needed in ["paths", "backup"] {
        if !table.contains_key(needed) {
            return Err(wrong(format!("{needed} is missing")));
        }
    }
    if run.is_none() && !WHOM.iter().any(|key| table.contains_key(*key)) {
        return Err(wrong(
            "say whom to follow: run = [\"CMD\", \"ARG\"], cgroup = \"DIR\", pid = NUMBER or everyone = true"
                .into(),
        ));
    }
    if let Some(run) = run {
        words.push("--".into());
        words.extend(run);
    }
    Ok(words.into_iter().map(OsString::from).collect())
}

/// The values of an option; none for one without.
fn values(key: &Key, value: &Value, at: &str) -> Result<Vec<Option<String>>, ConfigError> {
    let bad = |what| form(at, key.name, what);
    let all = match (key.form, value) {
        (Form::Text, Value::String(text)) => vec![text.clone()],
        (Form::Text, _) => return Err(bad("a text")),
        (Form::TextOrTexts, Value::String(text)) => vec![text.clone()],
        (Form::Texts | Form::TextOrTexts, value) => texts(at, key.name, value)?,
        (Form::Flag, Value::Boolean(true)) => return Ok(vec![None]),
        (Form::Flag, Value::Boolean(false)) => Vec::new(),
        (Form::Flag, _) => return Err(bad("true or false")),
        (Form::Numbers, Value::Integer(number)) => vec![number.to_string()],
        (Form::Numbers, Value::Array(all)) if !all.is_empty() => {
            let number = |value: &Value| value.as_integer().map(|n| n.to_string());
            all.iter().map(number).collect::<Option<_>>().ok_or_else(|| bad("numbers of processes"))?
        }
        (Form::Numbers, _) => return Err(bad("the number of a process, or a list of them")),
        (Form::Map, Value::Table(table)) => {
            let pair = |(from, to): (&String, &Value)| Some(format!("{from}={}", to.as_str()?));
            table
                .iter()
                .map(pair)
                .collect::<Option<_>>()
                .ok_or_else(|| bad("a table: \"/from\" = \"/to\""))?
        }
        (Form::Map, _) => return Err(bad("a table: \"/from\" = \"/to\"")),
        (Form::When, Value::String(text)) => vec![text.clone()],
        (Form::When, Value::Table(table)) if !table.is_empty() => {
            let mut words = Vec::new();
            for (word, value) in table {
                if !WHEN.contains(&word.as_str()) {
                    return Err(unknown(&format!("{at}, checkpoint"), word, &WHEN));
                }
                match value {
                    Value::String(text) => words.push(format!("{word}={text}")),
                    Value::Integer(number) => words.push(format!("{word}={number}")),
                    _ => return Err(form(at, word, "a text or a number")),
                }
            }
            vec![words.join(",")]
        }
        (Form::Policies, Value::Array(all)) => {
            all.iter().map(|value| policy(&format!("{at}, policy"), value)).collect::<Result<_, _>>()?
        }
        (Form::Policies, _) => return Err(bad("tables: [[group.NAME.policy]]")),
        (Form::When, _) => {
            return Err(bad("a text like \"every=1s\", or a table of every, bytes, ops, cron"));
        }
    };
    Ok(all.into_iter().map(Some).collect())
}

/// A policy in one word.
fn policy(at: &str, value: &Value) -> Result<String, ConfigError> {
    let Value::Table(table) = value else { return Err(form(at, "each", "a table: [[group.NAME.policy]]")) };
    let Some(Value::String(pattern)) = table.get("match") else {
        let why = "match is missing, or no text: a path, or a pattern".to_owned();
        return Err(ConfigError::Group { at: at.into(), why });
    };
    let mut settings = Vec::new();
    for (key, value) in table.iter().filter(|(key, _)| *key != "match") {
        if !OF_POLICY.contains(&key.as_str()) {
            return Err(unknown(at, key, &OF_POLICY));
        }
        let value = match value {
            Value::String(text) if !text.contains([',', ':']) => text.clone(),
            Value::Integer(number) => number.to_string(),
            _ => return Err(form(at, key, "a text without a comma or a colon, or a number")),
        };
        settings.push(format!("{key}={value}"));
    }
    if settings.is_empty() {
        let why = format!("{pattern:?} says nothing: give backup = \"write\" or \"close\"");
        return Err(ConfigError::Group { at: at.into(), why });
    }
    Ok(format!("{pattern}:{}", settings.join(",")))
}

fn texts(at: &str, key: &str, value: &Value) -> Result<Vec<String>, ConfigError> {
    let bad = || form(at, key, "a list of texts, at least one");
    let Value::Array(all) = value else { return Err(bad()) };
    if all.is_empty() {
        return Err(bad());
    }
    all.iter().map(|value| value.as_str().map(str::to_owned)).collect::<Option<_>>().ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> Vec<String> {
        let groups = parse(text).unwrap_or_else(|e| panic!("{e}"));
        groups[0].arguments.iter().map(|word| word.to_str().unwrap().to_owned()).collect()
    }

    fn refused(text: &str) -> String {
        parse(text).unwrap_err().to_string()
    }

    #[test]
    fn a_group_says_what_a_command_line_says() {
        let text = r#"
            [group.web]
            paths = ["/srv/web", "/etc/web"]
            backup = "unix:/run/bfs/r.sock"
            exclude = ["*.tmp"]
            maps = { "/srv/web" = "/data/web" }
            checkpoint = { every = "1s", ops = 1000 }
            rollback_on_failure = true
            kill_descendants = false
            run = ["./server", "--port", "80"]
        "#;
        let words = said(text);
        let wanted = [
            "run",
            "--group",
            "web",
            "--backup=unix:/run/bfs/r.sock",
            "--checkpoint=every=1s,ops=1000",
            "--exclude=*.tmp",
            "--map=/srv/web=/data/web",
            "--path=/srv/web",
            "--path=/etc/web",
            "--rollback-on-failure",
            "--",
            "./server",
            "--port",
            "80",
        ];
        let sorted = |words: Vec<String>| {
            let mut words = words;
            let end = words.iter().position(|word| word == "--").unwrap_or(words.len());
            words[3..end].sort();
            words
        };
        assert_eq!(sorted(words), sorted(wanted.map(str::to_owned).to_vec()));
        let text = "[group.web]\npaths = ['/a']\nbackup = 'dir:/x'\npid = 1\n\
                    [[group.web.policy]]\nmatch = '*.db'\nbackup = 'close'\nretries = 2\n\
                    [[group.web.policy]]\nmatch = '/a/b'\nbackup = 'write'\n";
        let words = said(text);
        let policies: Vec<_> = words.iter().filter(|word| word.starts_with("--policy=")).collect();
        assert_eq!(policies, ["--policy=*.db:backup=close,retries=2", "--policy=/a/b:backup=write"]);
        let text =
            "[group.db]\npaths = ['/srv/db']\nbackup = 'dir:/x'\npid = [1, 2]\ncheckpoint = 'manual'\n";
        let words = said(text);
        assert!(
            words[0] == "attach"
                && ["--pid=1", "--pid=2"].iter().all(|pid| words.contains(&(*pid).to_owned()))
        );
    }

    #[test]
    fn a_cgroup_has_process_state_too() {
        let group = "[group.db]\npaths = ['/srv/db']\nbackup = 'dir:/x'\ncgroup = '/c'\n";
        let words = said(&format!("{group}with_process = true\ncriu = '/c/criu'\nprocess_keep = 5\n"));
        assert_eq!(words[0], "attach");
        for word in ["--cgroup=/c", "--with-process", "--criu=/c/criu", "--process-keep=5"] {
            assert!(words.contains(&word.to_owned()), "{words:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_the_nearest_that_is_right() {
        let group = |line: &str| refused(&format!("[group.web]\npaths = ['/a']\nbackup = 'dir:/x'\n{line}"));
        assert_eq!(
            group("exclud = ['x']"),
            "group \"web\": there is no \"exclud\"; did you mean \"exclude\"?"
        );
        assert_eq!(group("zzzzzzzzzzzz = 1"), "group \"web\": there is no \"zzzzzzzzzzzz\"");
        assert_eq!(group("exclude = 'x'"), "group \"web\": exclude must be a list of texts, at least one");
        let said = group("checkpoint = { evry = '1s' }\npid = 1");
        assert_eq!(said, "group \"web\", checkpoint: there is no \"evry\"; did you mean \"every\"?");
        assert_eq!(group("run = ['a']\npid = 1"), "group \"web\": pid does not go together with run");
        assert_eq!(
            group("pid = 1\nrollback_on_failure = true"),
            "group \"web\": rollback_on_failure needs run"
        );
        assert_eq!(group("cgroup = '/c'\nrestart_on_abort = 1"), "group \"web\": restart_on_abort needs run");
        let policy = |line: &str| group(&format!("pid = 1\npolicy = [{{ {line} }}]"));
        let said = policy("match = '/a/b', bakup = 'write'");
        assert_eq!(said, "group \"web\", policy: there is no \"bakup\"; did you mean \"backup\"?");
        assert!(policy("backup = 'write'").contains("match is missing"));
        assert!(policy("match = '/a/b'").contains("says nothing"));
        assert!(group("").contains("say whom to follow"));
        assert_eq!(refused("[group.web]\npid = 1\nbackup = 'dir:/x'"), "group \"web\": paths is missing");
        assert_eq!(refused("[groups.web]"), "the file: there is no \"groups\"; did you mean \"group\"?");
        assert!(refused("").contains("no group"));
        assert!(refused("[group.web").contains("line 1"));
    }
}
