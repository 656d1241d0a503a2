//! What a bench yields: rows of measured values beside what they were measured against. Pure.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// One thing that was measured, or why it was not.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// What it is, unique within its bench.
    pub name: String,
    /// Unit of all values.
    pub unit: String,
    /// The same without us, or the limit; empty where there is nothing to compare with.
    pub baseline: Vec<f64>,
    /// One value for each repetition; empty where nothing could be measured.
    pub value: Vec<f64>,
    /// What was aimed at.
    pub aim: Option<Aim>,
    /// Why nothing was measured, or what one has to know of it.
    pub note: String,
}

/// What a row should reach. Ratios are value by baseline.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aim {
    /// The ratio is no higher.
    RatioAtMost(f64),
    /// The ratio is no lower.
    RatioAtLeast(f64),
    /// The value is no higher.
    AtMost(f64),
    /// The value is no lower.
    AtLeast(f64),
    /// The value is no more than this above the baseline.
    AboveBaselineAtMost(f64),
}

impl fmt::Display for Aim {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::RatioAtMost(most) => write!(f, "ratio <= {}", figure(*most)),
            Self::RatioAtLeast(least) => write!(f, "ratio >= {}", figure(*least)),
            Self::AtMost(most) => write!(f, "<= {}", figure(*most)),
            Self::AtLeast(least) => write!(f, ">= {}", figure(*least)),
            Self::AboveBaselineAtMost(most) => write!(f, "<= baseline + {}", figure(*most)),
        }
    }
}

impl Row {
    /// A row of measured values.
    pub fn new(name: impl Into<String>, unit: &str, baseline: Vec<f64>, value: Vec<f64>) -> Self {
        Self { name: name.into(), unit: unit.to_owned(), baseline, value, aim: None, note: String::new() }
    }

    /// A row of one value that nothing stands beside.
    pub fn single(name: impl Into<String>, unit: &str, value: f64) -> Self {
        Self::new(name, unit, Vec::new(), vec![value])
    }

    /// A row for what could not be measured here.
    pub fn not_here(name: impl Into<String>, why: &anyhow::Error) -> Self {
        Self::new(name, "", Vec::new(), Vec::new()).note(format!("not here: {why:#}"))
    }

    /// A row for what went wrong.
    pub fn failed(name: impl Into<String>, why: &anyhow::Error) -> Self {
        Self::new(name, "", Vec::new(), Vec::new()).note(format!("failed: {why:#}"))
    }

    /// With an aim.
    pub fn aim(mut self, aim: Aim) -> Self {
        self.aim = Some(aim);
        self
    }

    /// With a remark.
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    /// Median of the values by median of the baseline.
    pub fn ratio(&self) -> Option<f64> {
        Some(median(&self.value)? / median(&self.baseline)?)
    }

    /// Whether the aim was met; nothing where there is none, or nothing was measured.
    pub fn met(&self) -> Option<bool> {
        let value = median(&self.value)?;
        Some(match self.aim? {
            Aim::RatioAtMost(most) => self.ratio()? <= most,
            Aim::RatioAtLeast(least) => self.ratio()? >= least,
            Aim::AtMost(most) => value <= most,
            Aim::AtLeast(least) => value >= least,
            Aim::AboveBaselineAtMost(most) => value - median(&self.baseline)? <= most,
        })
    }

    /// The aim and what became of it, as a reader is told.
    pub fn verdict(&self) -> String {
        let Some(aim) = self.aim else { return String::new() };
        let became = match self.met() {
            None => "not measured",
            Some(true) => "met",
            Some(false) => "missed",
        };
        format!("{aim}: {became}")
    }

    /// The row with what follows from its samples.
    ///
    /// # Errors
    /// Never for the numbers that are measured here.
    pub fn json(&self) -> serde_json::Result<Value> {
        let mut value = serde_json::to_value(self)?;
        value["ratio"] = self.ratio().into();
        value["repetitions"] = self.value.len().into();
        value["met"] = self.met().into();
        for (name, samples) in [("baseline", &self.baseline), ("value", &self.value)] {
            value[format!("{name}_median")] = median(samples).into();
            value[format!("{name}_spread")] = spread(samples).into();
        }
        Ok(value)
    }
}

/// The middle of them.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        n if n % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// The value that so many percent of them do not exceed.
pub fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    values.get((values.len() * percent / 100).min(values.len().checked_sub(1)?)).copied()
}

/// From the lowest to the highest, as a share of the median.
pub fn spread(values: &[f64]) -> Option<f64> {
    let (low, high) = (percentile(values, 0)?, percentile(values, 100)?);
    median(values).filter(|median| *median != 0.0).map(|median| (high - low) / median)
}

/// Samples in short: the median, and half of the spread around it.
pub fn summary(samples: &[f64]) -> String {
    match (median(samples), spread(samples)) {
        (Some(median), Some(spread)) if samples.len() > 1 => {
            format!("{} ±{:.0}%", figure(median), spread * 50.0)
        }
        (Some(median), _) => figure(median),
        (None, _) => "-".to_owned(),
    }
}

/// A number with as many digits as one reads.
pub fn figure(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_the_spread_around_it() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        assert_eq!(spread(&[4.0, 2.0, 5.0]), Some(0.75));
        assert_eq!(spread(&[]), None);
        assert_eq!(percentile(&[3.0, 1.0, 2.0], 99), Some(3.0));
    }

    #[test]
    fn an_aim_is_met_missed_or_not_measured() {
        let row = |aim| Row::new("x", "s", vec![1.0, 2.0, 1.0], vec![1.1, 1.2, 1.0]).aim(aim);
        assert_eq!(row(Aim::RatioAtMost(1.1)).verdict(), "ratio <= 1.1: met");
        assert_eq!(row(Aim::RatioAtMost(1.05)).met(), Some(false));
        assert_eq!(row(Aim::AboveBaselineAtMost(0.2)).met(), Some(true));
        assert_eq!(row(Aim::AtLeast(1.2)).met(), Some(false));
        let none = Row::not_here("x", &anyhow::anyhow!("no disk")).aim(Aim::AtMost(1.0));
        assert_eq!((none.met(), none.note.as_str()), (None, "not here: no disk"));
    }

    #[test]
    fn a_row_comes_back_from_its_json() {
        let row = Row::new("x", "s", vec![1.0], vec![1.5]).aim(Aim::RatioAtMost(2.0));
        let json = row.json().unwrap();
        assert_eq!(json["ratio"], 1.5);
        let back: Row = serde_json::from_value(json).unwrap();
        assert_eq!((back.value, back.aim), (row.value, row.aim));
    }

    #[test]
    fn figures_are_short() {
        assert_eq!([0.0, 1234.5, 12.34, 1.5, 1.0404].map(figure), ["0", "1234", "12.3", "1.5", "1.04"]);
    }
}
