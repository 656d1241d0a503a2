//! `cargo xtask bench docs`: puts what was measured last into docs/performance.md, between marks, and its plots
//! beside it. All other words there are written by hand.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::BENCHES;
use super::report::Report;
use super::row::{Row, summary};
use crate::shell::root;

/// Writes a section for each bench of which the folder has a report that is good for figures.
pub fn write(from: &Path) -> Result<()> {
    let path = root().join("docs/performance.md");
    let plots = root().join("docs/performance");
    fs::create_dir_all(&plots)?;
    let mut text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let mut met = [0, 0];
    for bench in &BENCHES {
        let Some(report) = Report::read(from, bench.name)? else {
            println!("{}: not measured, its section stays as it is", bench.name);
            continue;
        };
        ensure!(!report.quick, "{} is of a short run (--quick): its figures are no good", bench.name);
        let plot = format!("{}.svg", bench.name);
        fs::copy(from.join(&plot), plots.join(&plot))?;
        text = replaced(&text, bench.name, &section(&report))?;
        for row in &report.rows {
            match row.met() {
                Some(true) => met[0] += 1,
                Some(false) => met[1] += 1,
                None => {}
            }
        }
        println!("{}: {} rows", bench.name, report.rows.len());
    }
    fs::write(&path, text)?;
    println!("written to docs/performance.md: {} aims met, {} missed", met[0], met[1]);
    Ok(())
}

/// The text with another section between the marks of this bench.
fn replaced(text: &str, bench: &str, section: &str) -> Result<String> {
    let (begin, end) = (format!("<!-- bench {bench} -->\n"), format!("<!-- end of {bench} -->\n"));
    let (before, rest) = text.split_once(&begin).with_context(|| format!("no mark {begin:?}"))?;
    let (_, after) = rest.split_once(&end).with_context(|| format!("no mark {end:?}"))?;
    Ok(format!("{before}{begin}{section}{end}{after}"))
}

fn section(report: &Report) -> String {
    let mut out = format!("`cargo xtask bench {}`. {}.\n\n", report.bench, report.machine);
    if report.rows.iter().any(|row| !row.value.is_empty()) {
        out += "| | unit | baseline | value | ratio | runs | aim |\n|---|---|---:|---:|---:|---:|---|\n";
    }
    for row in report.rows.iter().filter(|row| !row.value.is_empty()) {
        let note = if row.note.is_empty() { String::new() } else { format!(" ({})", row.note) };
        out += &format!(
            "| {}{note} | {} | {} | {} | {} | {} | {} |\n",
            row.name,
            row.unit,
            summary(&row.baseline),
            summary(&row.value),
            row.ratio().map_or("-".to_owned(), |ratio| format!("{ratio:.3}")),
            row.value.len(),
            verdict(row),
        );
    }
    let without: Vec<&Row> = report.rows.iter().filter(|row| row.value.is_empty()).collect();
    if !without.is_empty() {
        out += "\nWithout a figure:\n";
        for row in without {
            // The first line says it; the rest is what a program printed.
            out += &format!("- {}: {}\n", row.name, row.note.lines().next().unwrap_or_default());
        }
    }
    out + &format!("\n![{0}](performance/{0}.svg)\n", report.bench)
}

fn verdict(row: &Row) -> String {
    match row.met() {
        Some(false) => format!("**{}**", row.verdict()),
        _ => row.verdict(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_stands_between_the_marks_is_replaced() {
        let text = "a\n<!-- bench x -->\nold\n<!-- end of x -->\nb\n";
        let new = replaced(text, "x", "new\n").unwrap();
        assert_eq!(new, "a\n<!-- bench x -->\nnew\n<!-- end of x -->\nb\n");
        assert_eq!(replaced(&new, "x", "new\n").unwrap(), new);
        assert!(replaced(text, "y", "new\n").is_err());
    }

    #[test]
    fn the_page_has_marks_for_each_bench() {
        let mut text = fs::read_to_string(root().join("docs/performance.md")).unwrap();
        for bench in &BENCHES {
            text = replaced(&text, bench.name, "").unwrap();
        }
    }
}
