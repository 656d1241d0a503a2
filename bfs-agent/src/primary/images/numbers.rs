//! The numbers of the processes in a set of CRIU's images (`pstree.img`), and who else has one of them.
//!
//! CRIU gives each process and thread the number that it had, and makes again also the leaders of process groups and
//! sessions that had ended, for as long as it needs them. The kernel gives a number only where it is nobody's, be it as
//! the number of a thread, of a group or of a session (`alloc_pid()` in kernel/pid.c).
//!
//! The entries of the image are protocol buffers `pstree_entry` (CRIU's `images/pstree.proto`).

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use super::beside::{Conflict, Who};
use super::protobuf::{entries, fields, varint};
use crate::primary::process::groups;

/// `pstree_entry.pid`, `.pgid` and `.sid`
const NUMBERS: [u64; 3] = [1, 3, 4];
/// `pstree_entry.threads`
const THREADS: u64 = 5;

/// Where the kernel tells the number that it gave last, and is told (`proc_sys_kernel(5)`).
const LAST: &str = "/proc/sys/kernel/ns_last_pid";
/// The highest that it gives, and one; then it begins again behind those that it keeps (`RESERVED_PIDS` in kernel/pid.c).
const MAX: &str = "/proc/sys/kernel/pid_max";
const RESERVED: i32 = 300;
/// CRIU and what it starts get no more numbers than that.
const OWN: i32 = 1000;

/// The numbers that a restore of a set needs.
///
/// # Errors
/// What the file system said, or that the image is not understood.
pub(super) fn numbers(images: &Path) -> io::Result<BTreeSet<i32>> {
    let image = fs::read(images.join("pstree.img"))?;
    numbers_in(&image).ok_or_else(|| io::Error::other("pstree.img is not understood"))
}

fn numbers_in(image: &[u8]) -> Option<BTreeSet<i32>> {
    let mut found = BTreeSet::new();
    let mut add = |value: u64| {
        let number = i32::try_from(value).ok()?;
        // None, in its namespace.
        found.extend(Some(number).filter(|number| *number > 0));
        Some(())
    };
    for entry in entries(image)? {
        for field in fields(entry)? {
            match (field.number, field.value, field.body) {
                (number, Some(value), _) if number == THREADS || NUMBERS.contains(&number) => add(value)?,
                (THREADS, _, Some(mut packed)) => {
                    while !packed.is_empty() {
                        add(varint(&mut packed)?)?;
                    }
                }
                _ => {}
            }
        }
    }
    Some(found)
}

/// Looks whether anybody has one of these numbers of whom `ours` does not say that it is to be ended.
///
/// # Errors
/// [`Conflict::Taken`].
pub(super) fn are_free(numbers: &BTreeSet<i32>, ours: impl Fn(u32) -> bool) -> Result<(), Conflict> {
    for number in numbers {
        let status = fs::read(format!("/proc/{number}/status")).unwrap_or_default();
        let status = String::from_utf8_lossy(&status);
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).map(str::trim);
        let process = |name: &str| field(name).and_then(|pid| pid.parse::<u32>().ok());
        let Some(has) = process("Tgid:").filter(|tgid| !ours(*tgid)) else { continue };
        let ended = field("State:").is_some_and(|state| state.starts_with('Z'));
        let how = match process("PPid:") {
            Some(parent) if ended => {
                format!(
                    "{} has ended, and its parent, {}, has not waited for it",
                    Who::of(has),
                    Who::of(parent)
                )
            }
            _ => format!("{} has it", Who::of(has)),
        };
        return Err(Conflict::Taken(*number, how));
    }
    let shared = groups()
        .into_iter()
        .flat_map(|(pid, group, session)| [(pid, group, "process group"), (pid, session, "session")]);
    for (pid, number, what) in shared {
        if let Some(number) = i32::try_from(number).ok().filter(|n| numbers.contains(n))
            && !ours(pid)
        {
            return Err(Conflict::Taken(number, format!("{} has it as its {what}", Who::of(pid))));
        }
    }
    Ok(())
}

/// Has the kernel give other numbers than these to CRIU itself.
pub(super) fn pass_by(numbers: &BTreeSet<i32>) {
    let read = |path| fs::read_to_string(path).ok()?.trim().parse::<i32>().ok();
    let (Some(last), Some(max)) = (read(LAST), read(MAX)) else { return };
    let behind = behind(if last >= max - OWN { RESERVED } else { last }, numbers);
    if behind != last {
        // Where that is refused it shows whether it was needed.
        let _ = fs::write(LAST, behind.to_string());
    }
}

/// The number from which on as many follow as CRIU may need: this one, or one of those.
pub(super) fn behind(last: i32, numbers: &BTreeSet<i32>) -> i32 {
    let mut behind = last;
    while let Some(next) = numbers.range(behind + 1..).next().filter(|next| **next - behind <= OWN) {
        behind = *next;
    }
    behind
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_threads_groups_and_sessions_are_found() {
        let one = [0x08, 7, 0x10, 1, 0x18, 7, 0x20, 5, 0x28, 7, 0x28, 0x88, 1];
        let packed = [0x08, 9, 0x10, 7, 0x18, 0, 0x20, 5, 0x2a, 3, 9, 0x89, 1];
        let mut image = b"magicmag".to_vec();
        for entry in [one, packed] {
            image.extend((entry.len() as u32).to_le_bytes());
            image.extend(entry);
        }
        assert_eq!(numbers_in(&image), Some(BTreeSet::from([5, 7, 9, 136, 137])));
        assert_eq!(numbers_in(&image[..image.len() - 1]), None);
    }

    #[test]
    fn whoever_has_a_number_is_named() {
        let own = std::process::id();
        let numbers = BTreeSet::from([own as i32]);
        let taken = are_free(&numbers, |_| false).unwrap_err().to_string();
        assert!(taken.contains(&format!("number {own}")), "{taken}");
        assert!(taken.contains(&Who::of(own).to_string()), "{taken}");
        are_free(&numbers, |pid| groups().iter().any(|(one, ..)| *one == pid)).unwrap();
        // Above the highest number that the kernel gives.
        are_free(&BTreeSet::from([1 << 22 | 1]), |_| false).unwrap();
    }

    #[test]
    fn a_child_that_nobody_waited_for_has_its_number() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let number = child.id();
        let stat = || fs::read_to_string(format!("/proc/{number}/stat")).unwrap();
        while !stat().contains(") Z ") {
            std::thread::yield_now();
        }
        let taken = are_free(&BTreeSet::from([number as i32]), |_| false).unwrap_err().to_string();
        assert!(taken.contains("has not waited"), "{taken}");
        child.wait().unwrap();
    }

    #[test]
    fn numbers_that_come_next_are_passed_by() {
        let numbers = BTreeSet::from([500, 1400, 9000]);
        let behind = |last| behind(last, &numbers);
        assert_eq!([100, 1399, 1400, 8500, 9001].map(behind), [1400, 1400, 1400, 9000, 9001]);
    }
}
