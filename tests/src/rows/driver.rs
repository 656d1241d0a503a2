//! The program whose writes are captured: it starts a process for each row and tells the test where
//! each of them pauses.
//!
//! Towards the test it speaks lines over a socket: `prepared` when all rows stand at their first pause,
//! `paused ROW` at each further one and when the row is done (each is answered by a line when the
//! checkpoint was compared), `unsupported ROW ERRNO` or `failed ROW WHY` where a row ends early, `done`.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{At, Row, all, make_dir};
use crate::programs::Place;

/// Name of the test's socket.
pub const SOCKET: &str = "rows.sock";

/// Begin of what a row's process says when it ended early: the number of the error follows.
const ENDED: u8 = b'e';

struct Process {
    row: &'static Row,
    pid: i32,
    pauses: UnixStream,
}

enum Stands {
    Paused,
    Done,
    Ended { errno: i32, why: String },
}

/// Runs the rows whose names hold `filter`.
///
/// # Errors
/// When the test is gone or a process does not start.
pub fn run(place: &Place, beside: &Path, filter: &str) -> Result<()> {
    let socket = UnixStream::connect(place.aux.join(SOCKET)).context("the test does not listen")?;
    let mut answers = BufReader::new(socket.try_clone()?);
    let mut say = |line: String, answered: bool| -> Result<()> {
        (&socket).write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        ensure!(!answered || answers.read_line(&mut answer)? > 0, "the test is gone");
        Ok(())
    };
    place.ready()?;
    let mut standing = Vec::new();
    let ended = |row: &Row, stands: Stands| -> Result<bool> {
        match stands {
            Stands::Paused => return Ok(true),
            Stands::Done => {}
            Stands::Ended { errno, why } => say_ended(&socket, row, errno, &why)?,
        }
        Ok(false)
    };
    for row in all().into_iter().filter(|row| row.name.contains(filter)) {
        let mut process = start(row, place, beside)?;
        let stands = process.go()?;
        ensure!(!matches!(stands, Stands::Done), "{} made nothing after its first pause", row.name);
        if ended(row, stands)? {
            standing.push(process);
        } else {
            process.wait()?;
        }
    }
    say("prepared".into(), true)?;
    for mut process in standing {
        loop {
            let stands = process.go()?;
            let early = matches!(stands, Stands::Ended { .. });
            let on = ended(process.row, stands)?;
            if !early {
                say(format!("paused {}", process.row.name), true)?;
            }
            if !on {
                break;
            }
        }
        process.wait()?;
    }
    say("done".into(), true)
}

fn say_ended(mut socket: &UnixStream, row: &Row, errno: i32, why: &str) -> Result<()> {
    let known = [libc::EOPNOTSUPP, libc::ENOTTY, libc::EINVAL, libc::EPERM, libc::ENODEV];
    // A kernel that does not have the call at all.
    let unsupported = errno == libc::ENOSYS || known.contains(&errno) && !row.refused_by.is_empty();
    let line = if unsupported {
        format!("unsupported {} {errno}\n", row.name)
    } else {
        format!("failed {} {}\n", row.name, why.replace('\n', " "))
    };
    Ok(socket.write_all(line.as_bytes())?)
}

fn start(row: &'static Row, place: &Place, beside: &Path) -> Result<Process> {
    let folder = row.name.replace('/', "-");
    let (ours, theirs) = UnixStream::pair()?;
    let at = At {
        dir: make_dir(&place.data.join(&folder))?,
        outside: make_dir(&place.aux.join(&folder))?,
        beside: make_dir(&beside.join(&folder))?,
        pauses: theirs,
    };
    // SAFETY: the driver has one thread, so the child may do whatever it likes.
    let pid = unsafe { libc::fork() };
    ensure!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        drop(ours);
        // SAFETY: ends the child without the destructors that belong to the parent.
        unsafe { libc::_exit(child(row, &at)) };
    }
    Ok(Process { row, pid, pauses: ours })
}

/// Waits until it may go, does the row, says how it ended.
fn child(row: &Row, at: &At) -> i32 {
    let mut pauses = &at.pauses;
    if pauses.read_exact(&mut [0]).is_err() {
        return 1;
    }
    let Err(error) = (row.run)(at) else { return 0 };
    let mut message = vec![ENDED];
    message.extend(error.raw_os_error().unwrap_or(0).to_le_bytes());
    message.extend(error.to_string().as_bytes());
    // The driver sees a process that said nothing as failed.
    let _ = pauses.write_all(&message);
    0
}

impl Process {
    /// Lets the row go on to its next pause or its end.
    fn go(&mut self) -> Result<Stands> {
        self.pauses.write_all(b"g")?;
        let mut byte = [0];
        if self.pauses.read(&mut byte)? == 0 {
            return Ok(Stands::Done);
        }
        if byte[0] != ENDED {
            return Ok(Stands::Paused);
        }
        let mut errno = [0; 4];
        self.pauses.read_exact(&mut errno)?;
        let mut why = String::new();
        self.pauses.read_to_string(&mut why)?;
        Ok(Stands::Ended { errno: i32::from_le_bytes(errno), why })
    }

    fn wait(&self) -> Result<()> {
        let mut status = 0;
        // SAFETY: the child is ours and was not waited for.
        let waited = unsafe { libc::waitpid(self.pid, &raw mut status, 0) };
        ensure!(waited == self.pid && status == 0, "the process of {} ended with {status:#x}", self.row.name);
        Ok(())
    }
}
