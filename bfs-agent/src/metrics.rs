//! Numbers for monitors, in the text format of Prometheus (version 0.0.4). Pure.

use std::fmt::Write;

use bfs_common::wire::StoreState;

/// A text in the making. Lines of one name follow each other.
#[derive(Default)]
pub(crate) struct Exposition {
    text: String,
    name: &'static str,
}

impl Exposition {
    fn line(&mut self, kind: &str, name: &'static str, help: &str, labels: &[(&str, &str)], value: f64) {
        if self.name != name {
            self.name = name;
            let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        }
        let labels: Vec<String> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escaped(value))).collect();
        let _ = writeln!(self.text, "{name}{{{}}} {value}", labels.join(","));
    }

    /// A value that goes up and down.
    pub(crate) fn gauge(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: f64) {
        self.line("gauge", name, help, labels, value);
    }

    /// A number that only goes up while the process lives.
    pub(crate) fn counter(&mut self, name: &'static str, help: &str, labels: &[(&str, &str)], value: u64) {
        self.line("counter", name, help, labels, value as f64);
    }

    /// How a store stands.
    pub(crate) fn store(&mut self, name: &'static str, labels: &[(&str, &str)], is: StoreState) {
        for state in StoreState::ALL {
            let labels = [labels, &[("state", state.name())]].concat();
            self.gauge(name, "1 for how the store stands", &labels, flag(is == state));
        }
    }

    /// The text.
    pub(crate) fn text(self) -> String {
        self.text
    }
}

fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A truth as a number.
pub(crate) fn flag(set: bool) -> f64 {
    f64::from(u8::from(set))
}

/// Each line is a comment or a name, labels and a number, and lines of one name stand together.
#[cfg(test)]
pub(crate) fn is_sound(text: &str) {
    let mut names = std::collections::BTreeSet::new();
    let mut last = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            last = rest.split(' ').next().unwrap().to_owned();
            assert!(names.insert(last.clone()), "{last} stands in two places");
        } else if !line.starts_with("# HELP ") {
            let (name, rest) = line.split_once('{').unwrap();
            assert_eq!(name, last, "{line}");
            let (labels, value) = rest.rsplit_once("} ").unwrap();
            assert!(labels.contains("group=\"") && value.parse::<f64>().is_ok(), "{line}");
        }
    }
    assert!(!names.is_empty());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_in_one_state_and_each_has_the_name_that_json_has() {
        for is in StoreState::ALL {
            assert_eq!(serde_json::to_value(is).unwrap(), is.name());
            let mut out = Exposition::default();
            out.store("x", &[("group", "g")], is);
            let text = out.text();
            is_sound(&text);
            let set: Vec<_> = text.lines().filter(|line| line.ends_with(" 1")).collect();
            assert_eq!(set, [format!("x{{group=\"g\",state=\"{}\"}} 1", is.name())]);
        }
    }
}
