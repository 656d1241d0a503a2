//! The known word that somebody meant who wrote another one. Pure.

/// The nearest of the known words; `None` when none is near.
#[must_use]
pub fn nearest<'a>(known: &[&'a str], word: &str) -> Option<&'a str> {
    let distances = known.iter().map(|name| (strsim::damerau_levenshtein(name, word), *name));
    distances.min().filter(|(distance, name)| *distance <= name.len() / 2 + 1).map(|(_, name)| name)
}

/// The same as the end of a sentence; empty when none is near.
#[must_use]
pub fn did_you_mean(near: Option<&str>) -> String {
    near.map_or_else(String::new, |near| format!("; did you mean {near:?}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_understood_and_nonsense_is_not() {
        let known = ["exclude", "include", "paths"];
        assert_eq!(nearest(&known, "exclud"), Some("exclude"));
        assert_eq!(nearest(&known, "zzzzzzzzzzzz"), None);
        assert_eq!(did_you_mean(nearest(&known, "path")), "; did you mean \"paths\"?");
    }
}
