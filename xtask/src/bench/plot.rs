//! A report as an SVG of horizontal bars: the ratios in one panel, and what has no baseline in one panel for
//! each unit. Written by hand: it is rectangles, lines and texts. Pure.

use std::fmt::Write;

use super::report::Report;
use super::row::{Aim, Row, figure, median};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 370.0;
const RIGHT: f64 = 110.0;
const ROW: f64 = 20.0;
const HEAD: f64 = 44.0;
/// From which highest to lowest a panel is logarithmic.
const LOGARITHMIC: f64 = 30.0;

struct Bar<'a> {
    row: &'a Row,
    value: f64,
    /// Where the aim stands on the same scale.
    aim: Option<f64>,
}

/// The plot of a report.
pub fn svg(report: &Report) -> String {
    let mut panels: Vec<(String, Vec<Bar>)> = Vec::new();
    for row in &report.rows {
        let (title, bar) = match (row.ratio(), median(&row.value), row.aim) {
            (Some(value), _, aim) => {
                let aim = aim.and_then(|aim| match aim {
                    Aim::RatioAtMost(aim) | Aim::RatioAtLeast(aim) => Some(aim),
                    _ => None,
                });
                ("ratio to the baseline".to_owned(), Bar { row, value, aim })
            }
            (None, Some(value), aim) => {
                let aim = aim.and_then(|aim| match aim {
                    Aim::AtMost(aim) | Aim::AtLeast(aim) => Some(aim),
                    _ => None,
                });
                (row.unit.clone(), Bar { row, value, aim })
            }
            (None, None, _) => continue,
        };
        match panels.iter_mut().find(|panel| panel.0 == title) {
            Some(panel) => panel.1.push(bar),
            None => panels.push((title, vec![bar])),
        }
    }
    let height: f64 = panels.iter().map(|(_, bars)| HEAD + ROW * bars.len() as f64).sum::<f64>() + 40.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    text(&mut out, 10.0, 20.0, "start", &format!("{}: {}", report.bench, report.about));
    let mut top = 30.0;
    for (title, bars) in &panels {
        panel(&mut out, top, title, bars);
        top += HEAD + ROW * bars.len() as f64;
    }
    out + "</svg>\n"
}

fn panel(out: &mut String, top: f64, title: &str, bars: &[Bar]) {
    let ratio = title.starts_with("ratio");
    let shown = bars.iter().flat_map(|bar| [Some(bar.value), bar.aim]).flatten().filter(|v| *v > 0.0);
    let (low, high) = shown.fold((f64::MAX, f64::MIN_POSITIVE), |(a, b), v| (a.min(v), b.max(v)));
    let (low, high) = if ratio { (low.min(1.0), high.max(1.0)) } else { (low, high) };
    let logarithmic = high / low > LOGARITHMIC;
    let x = |value: f64| {
        let share = if logarithmic {
            // A bar of the lowest is seen, too.
            ((value / low).max(1.0) * 1.5).ln() / (high / low * 1.5).ln()
        } else {
            value / high
        };
        LEFT + share * (WIDTH - LEFT - RIGHT)
    };
    let scale = if logarithmic { " (logarithmic)" } else { "" };
    let aims =
        if bars.iter().any(|bar| bar.aim.is_some()) { "; the red or green line is the aim" } else { "" };
    text(out, LEFT, top + HEAD - 12.0, "start", &format!("{title}{scale}{aims}"));
    let body = top + HEAD;
    for (at, bar) in bars.iter().enumerate() {
        let y = body + ROW * at as f64;
        let colour = if bar.row.met() == Some(false) { "#d08770" } else { "#5e81ac" };
        let width = (x(bar.value) - LEFT).max(0.0);
        rectangle(out, LEFT, y + 3.0, width, ROW - 6.0, colour);
        text(out, LEFT - 6.0, y + 14.0, "end", &bar.row.name);
        text(out, x(bar.value) + 5.0, y + 14.0, "start", &figure(bar.value));
        if let Some(aim) = bar.aim {
            let colour = if bar.row.met() == Some(true) { "#2e7d32" } else { "#b71c1c" };
            rectangle(out, x(aim) - 1.0, y + 1.0, 2.0, ROW - 2.0, colour);
        }
    }
    if ratio {
        rectangle(out, x(1.0), body, 0.7, ROW * bars.len() as f64, "#444444");
    }
}

fn rectangle(out: &mut String, x: f64, y: f64, width: f64, height: f64, colour: &str) {
    let _ = writeln!(
        out,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
    );
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, what: &str) {
    let what = what.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>");
}

#[cfg(test)]
mod tests {
    use super::super::machine::Machine;
    use super::*;

    #[test]
    fn every_measured_row_has_its_bar_and_nothing_breaks_the_markup() {
        let machine =
            Machine { cpus: 2, memory_gib: 1, kernel: "6.1".into(), file_system: "x".into(), load: 0.0 };
        let rows = vec![
            Row::new("a < b & c", "s", vec![1.0], vec![1.2]).aim(Aim::RatioAtMost(1.1)),
            Row::single("alone", "MB/s", 0.0),
            Row::not_here("none", &anyhow::anyhow!("why")),
        ];
        let report =
            Report { bench: "x".into(), about: "y".into(), quick: true, machine, failed: false, rows };
        let plot = svg(&report);
        assert!(plot.contains("a &lt; b &amp; c"), "{plot}");
        assert!(plot.contains("alone") && !plot.contains("none") && !plot.contains("NaN"), "{plot}");
        assert_eq!(plot.matches("#b71c1c").count(), 1);
    }
}
