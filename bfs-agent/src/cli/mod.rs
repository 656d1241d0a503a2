//! The two command lines.

use std::fmt;
use std::io::{self, Write};

pub mod agent;
pub mod replayer;

/// Writes to standard output. A reader that has seen enough (`| head`) is no error.
fn say(text: fmt::Arguments<'_>) -> io::Result<()> {
    say_to(&mut io::stdout().lock(), text)
}

fn say_to(to: &mut impl Write, text: fmt::Arguments<'_>) -> io::Result<()> {
    match to.write_fmt(text).and_then(|()| to.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(io::Error::new(error.kind(), format!("cannot write to standard output: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// [`say`] with the arguments of `println!`.
macro_rules! sayln {
    ($($text:tt)*) => {
        $crate::cli::say(format_args!("{}\n", format_args!($($text)*)))
    };
}
use sayln;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;

    use super::say_to;

    #[test]
    fn a_reader_that_has_gone_is_no_error_and_a_full_disk_is_one() {
        let (reader, mut writer) = io::pipe().unwrap();
        say_to(&mut writer, format_args!("seen\n")).unwrap();
        drop(reader);
        say_to(&mut writer, format_args!("not seen\n")).unwrap();
        let mut full = File::options().write(true).open("/dev/full").unwrap();
        let error = say_to(&mut full, format_args!("lost\n")).unwrap_err();
        assert!(error.to_string().starts_with("cannot write to standard output: "), "{error}");
    }
}
