//! The rows of one bench: printed as they come, kept as JSON and as a plot.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::machine::Machine;
use super::plot;
use super::row::{Row, summary};

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// Name of the bench.
    pub bench: String,
    /// What it measures.
    pub about: String,
    /// Whether it was a short run, whose figures are no good.
    pub quick: bool,
    /// Where it ran.
    pub machine: Machine,
    /// Whether something went wrong.
    #[serde(default)]
    pub failed: bool,
    /// In the order in which they were measured.
    pub rows: Vec<Row>,
}

impl Report {
    /// One without rows; prints the head of the table.
    ///
    /// # Errors
    /// When the machine does not say what it is.
    pub fn begin(bench: &str, about: &str, quick: bool) -> Result<Self> {
        println!("\n{bench}: {about}");
        println!("{:<56} {:>16} {:>16} {:>7} {:>3}  aim", "", "baseline", "value", "ratio", "n");
        let machine = Machine::this()?;
        Ok(Self {
            bench: bench.to_owned(),
            about: about.to_owned(),
            quick,
            machine,
            failed: false,
            rows: Vec::new(),
        })
    }

    /// Takes a row in, and prints it.
    pub fn add(&mut self, row: Row) {
        let ratio = row.ratio().map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
        let name =
            if row.unit.is_empty() { row.name.clone() } else { format!("{} [{}]", row.name, row.unit) };
        let line = format!(
            "{name:<56} {:>16} {:>16} {ratio:>7} {:>3}  {}  {}",
            summary(&row.baseline),
            summary(&row.value),
            row.value.len(),
            row.verdict(),
            row.note
        );
        println!("{}", line.trim_end());
        self.rows.push(row);
    }

    /// Takes the rows in, or one that says why there are none; then the bench as a whole has failed, and goes on.
    pub fn attempt(&mut self, name: &str, rows: Result<Vec<Row>>) {
        match rows {
            Ok(rows) => rows.into_iter().for_each(|row| self.add(row)),
            Err(why) => {
                self.failed = true;
                self.add(Row::failed(name, &why));
            }
        }
    }

    /// Keeps of an earlier run what was not measured now.
    pub fn keep(&mut self, earlier: Self) {
        if earlier.quick != self.quick {
            return;
        }
        let now = std::mem::replace(&mut self.rows, earlier.rows);
        for row in now {
            match self.rows.iter_mut().find(|there| there.name == row.name) {
                Some(there) => *there = row,
                None => self.rows.push(row),
            }
        }
    }

    /// Writes BENCH.json and BENCH.svg into the folder.
    ///
    /// # Errors
    /// What the disk met.
    pub fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder)?;
        let path = Self::path(folder, &self.bench);
        let rows = self.rows.iter().map(Row::json).collect::<serde_json::Result<Vec<Value>>>()?;
        let report = json!({
            "bench": self.bench, "about": self.about, "quick": self.quick, "machine": self.machine,
            "failed": self.failed, "rows": rows,
        });
        fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
        fs::write(path.with_extension("svg"), plot::svg(self))?;
        println!("written to {} and .svg", path.display());
        Ok(())
    }

    /// What a run wrote; nothing where none did.
    ///
    /// # Errors
    /// When the file is there and is no report of this bench.
    pub fn read(folder: &Path, bench: &str) -> Result<Option<Self>> {
        let path = Self::path(folder, bench);
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let report: Self = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        ensure!(report.bench == bench, "{} is of another bench", path.display());
        Ok(Some(report))
    }

    fn path(folder: &Path, bench: &str) -> PathBuf {
        folder.join(format!("{bench}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(quick: bool, rows: &[(&str, f64)]) -> Report {
        let machine =
            Machine { cpus: 2, memory_gib: 1, kernel: "6.1".into(), file_system: "x".into(), load: 0.0 };
        let rows = rows.iter().map(|(name, value)| Row::single(*name, "s", *value)).collect();
        Report { bench: "x".into(), about: "y".into(), quick, machine, failed: false, rows }
    }

    #[test]
    fn what_was_not_measured_again_is_kept() {
        let mut now = report(false, &[("b", 2.0), ("c", 3.0)]);
        now.keep(report(true, &[("a", 9.0)]));
        assert_eq!(now.rows.len(), 2, "a short run is no good for it");
        now.keep(report(false, &[("a", 1.0), ("b", 1.0)]));
        let rows: Vec<_> = now.rows.iter().map(|row| (row.name.as_str(), row.value[0])).collect();
        assert_eq!(rows, [("a", 1.0), ("b", 2.0), ("c", 3.0)]);
    }

    #[test]
    fn a_report_comes_back_from_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Report::read(folder.path(), "x").unwrap().is_none());
        report(true, &[("a", 1.0)]).write(folder.path()).unwrap();
        let back = Report::read(folder.path(), "x").unwrap().unwrap();
        assert_eq!((back.quick, back.rows[0].value[0]), (true, 1.0));
    }
}
