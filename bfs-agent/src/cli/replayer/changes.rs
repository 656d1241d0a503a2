//! `versions` and `diff`: what checkpoints changed.

use std::fmt::Write;
use std::path::Path;

use bfs_common::past::{Aspect, Difference, Event, Side, VersionLine};
use bfs_common::record::FileKind;
use serde_json::{Value, json};

use super::giveback::From;
use crate::cli::{say, sayln};
use crate::generation::{At, time_text};

/// Which kept checkpoints changed a path.
pub(super) fn versions(from: &From, path: &Path, as_json: bool) -> anyhow::Result<()> {
    anyhow::ensure!(path.is_absolute(), "{}: give the absolute path on the primary", path.display());
    let (mut client, _owner) = from.open()?;
    let all = client.versions(from.group(), path)?;
    anyhow::ensure!(
        !all.is_empty(),
        "nothing stands at {} in any checkpoint that is kept; `bfs-replayer generations` lists them",
        path.display()
    );
    if as_json {
        let all: Vec<Value> = all.iter().map(version_json).collect();
        sayln!("{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        say(format_args!("{}", versions_table(&all, path)))?;
    }
    Ok(())
}

/// What differs between two kept checkpoints.
pub(super) fn diff(from: &From, [a, b]: [&At; 2], as_json: bool) -> anyhow::Result<()> {
    let (mut client, _owner) = from.open()?;
    let all = client.generations(from.group())?;
    let find = |at: &At| at.find(&all).map_err(|why| anyhow::anyhow!("group {:?}: {why}", from.group()));
    let (a, b) = (find(a)?, find(b)?);
    let mut all = client.differences(from.group(), a.min(b), a.max(b))?;
    if a > b {
        all.iter_mut().for_each(|d| std::mem::swap(&mut d.before, &mut d.after));
    }
    if as_json {
        let all: Vec<Value> = all.iter().map(difference_json).collect();
        sayln!("{}", serde_json::to_string_pretty(&all)?)?;
    } else {
        for difference in &all {
            sayln!("{}", difference_line(difference))?;
        }
        let what = match all.len() {
            0 => "no difference".into(),
            1 => "1 difference".into(),
            n => format!("{n} differences"),
        };
        sayln!("{what} from checkpoint {a} to {b}")?;
    }
    Ok(())
}

fn name(aspect: Aspect) -> &'static str {
    match aspect {
        Aspect::Names => "names",
        Aspect::Content => "content",
        Aspect::Mode => "mode",
        Aspect::Owner => "owner",
        Aspect::Time => "time",
        Aspect::Xattrs => "xattrs",
    }
}

fn names(aspects: &[Aspect]) -> String {
    aspects.iter().map(|aspect| name(*aspect)).collect::<Vec<_>>().join(", ")
}

fn shown(side: &Side) -> String {
    let all: Vec<String> = side.paths.iter().map(|path| path.as_path().display().to_string()).collect();
    all.join(" = ")
}

fn difference_line(d: &Difference) -> String {
    let mut line = match (&d.before, &d.after) {
        (Some(before), Some(after)) if before.paths == after.paths => format!("changed  {}", shown(after)),
        (Some(before), Some(after)) => format!("renamed  {} -> {}", shown(before), shown(after)),
        (Some(before), None) => format!("removed  {}", shown(before)),
        (None, Some(after)) => format!("added    {}", shown(after)),
        (None, None) => String::new(),
    };
    let rest: Vec<Aspect> = d.changed.iter().copied().filter(|aspect| *aspect != Aspect::Names).collect();
    if !rest.is_empty() {
        line.push_str(&format!("  ({}", names(&rest)));
        if d.bytes > 0 {
            line.push_str(&format!(": {} byte{}", d.bytes, if d.bytes == 1 { "" } else { "s" }));
        }
        line.push(')');
    }
    line
}

fn versions_table(all: &[VersionLine], path: &Path) -> String {
    let mut out =
        String::from("checkpoint  time                          size  modified              what it did\n");
    for line in all {
        let (size, modified) = match &line.after {
            Some(side) if side.kind == FileKind::Regular => (side.size.to_string(), modified(side)),
            Some(side) => ("-".into(), modified(side)),
            None => ("-".into(), "-".into()),
        };
        let did = match line.event {
            Event::Oldest => "the oldest that is kept".to_owned(),
            Event::Created => "created".to_owned(),
            Event::Changed => names(&line.changed),
            Event::Replaced => format!("replaced: {}", names(&line.changed)),
            Event::Removed => "removed".to_owned(),
        };
        // Writing to a string does not fail.
        let _ = write!(
            out,
            "{:>10}  {:20}  {size:>12}  {modified:20}  {did}",
            line.checkpoint.0,
            time_text(line.label.wall_ns)
        );
        if let Some(side) = line.after.as_ref().filter(|side| side.paths.iter().all(|p| p.as_path() != path))
        {
            let _ = write!(out, ", at {}", shown(side));
        }
        if !line.label.tag.is_empty() {
            let _ = write!(out, "  [{}]", line.label.tag);
        }
        out.push('\n');
    }
    out
}

fn modified(side: &Side) -> String {
    time_text(side.meta.mtime_sec.saturating_mul(1_000_000_000))
}

fn side_json(side: &Side) -> Value {
    json!({
        "paths": side.paths.iter().map(|path| path.as_path().to_string_lossy()).collect::<Vec<_>>(),
        "kind": side.kind,
        "size": side.size,
        "mode": format!("{:04o}", side.meta.permissions),
        "uid": side.meta.uid,
        "gid": side.meta.gid,
        "mtime_sec": side.meta.mtime_sec,
        "mtime_nsec": side.meta.mtime_nsec,
    })
}

fn difference_json(d: &Difference) -> Value {
    json!({
        "before": d.before.as_ref().map(side_json),
        "after": d.after.as_ref().map(side_json),
        "changed": d.changed,
        "bytes": d.bytes,
    })
}

fn version_json(line: &VersionLine) -> Value {
    json!({
        "checkpoint": line.checkpoint,
        "wall_ns": line.label.wall_ns,
        "tag": line.label.tag,
        "event": line.event,
        "after": line.after.as_ref().map(side_json),
        "changed": line.changed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bfs_common::record::{CheckpointId, CheckpointLabel, Meta, PathBytes};

    fn side(path: &str) -> Side {
        let meta = Meta { mtime_sec: 1_795_267_445, ..Meta::default() };
        Side { paths: vec![PathBytes::new(path.as_ref())], kind: FileKind::Regular, size: 9, meta }
    }

    #[test]
    fn a_line_for_each_difference() {
        let line = |before: Option<&str>, after: Option<&str>, changed: &[Aspect], bytes| {
            let (before, after) = (before.map(side), after.map(side));
            difference_line(&Difference { before, after, changed: changed.to_vec(), bytes })
        };
        assert_eq!(line(None, Some("/a"), &[], 9), "added    /a");
        assert_eq!(line(Some("/a"), None, &[], 9), "removed  /a");
        let both = [Aspect::Content, Aspect::Time];
        assert_eq!(line(Some("/a"), Some("/a"), &both, 3), "changed  /a  (content, time: 3 bytes)");
        assert_eq!(line(Some("/a"), Some("/b"), &[Aspect::Names], 0), "renamed  /a -> /b");
    }

    #[test]
    fn a_line_for_each_version() {
        let version = |n, event, after, changed: &[Aspect], tag: &str| VersionLine {
            checkpoint: CheckpointId(n),
            label: CheckpointLabel { tag: tag.into(), ..CheckpointLabel::default() },
            event,
            after,
            changed: changed.to_vec(),
        };
        let all = [
            version(3, Event::Created, Some(side("/b")), &[], ""),
            version(4, Event::Changed, Some(side("/a")), &[Aspect::Names], "x"),
            version(5, Event::Removed, None, &[], ""),
        ];
        let text = versions_table(&all, Path::new("/a"));
        let ends: Vec<&str> = text.lines().skip(1).map(|line| line.split_at(48).1).collect();
        let wanted = [
            "2026-11-21T13:24:05Z  created, at /b",
            "2026-11-21T13:24:05Z  names  [x]",
            "-                     removed",
        ];
        assert_eq!(ends, wanted, "{text}");
    }
}
