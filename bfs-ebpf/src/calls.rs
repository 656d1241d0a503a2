//! Which system calls are followed, and where their arguments are (x86-64 table,
//! `arch/x86/entry/syscalls/syscall_64.tbl`).

/// How a call is treated.
pub mod class {
    /// Not followed.
    pub const NONE: u8 = 0;
    /// Writes bytes through descriptor 0.
    pub const WRITE: u8 = 1;
    /// Changes the object of descriptor 0.
    pub const DESCRIPTOR: u8 = 2;
    /// Closes descriptor 0.
    pub const CLOSE: u8 = 3;
    /// Opens, and may create or truncate.
    pub const OPEN: u8 = 4;
    /// Takes one or two paths.
    pub const PATH: u8 = 5;
    /// Writes through descriptor 0 or 2 what is read elsewhere.
    pub const COPY: u8 = 6;
    /// `ioctl`.
    pub const IOCTL: u8 = 7;
    /// `mmap`.
    pub const MMAP: u8 = 8;
    /// Changes the memory map.
    pub const MEMORY: u8 = 9;
    /// Sets the position of descriptor 0; matters where others use it too.
    pub const SEEK: u8 = 10;
    /// Gives advice about memory, which may punch holes into the file that is mapped there.
    pub const ADVICE: u8 = 12;
    /// Changes what a descriptor stands for, or lets others use it.
    pub const TABLE: u8 = 13;
    /// Stores into the memory of another process.
    pub const FOREIGN_STORE: u8 = 101;
    /// Takes a descriptor of another process.
    pub const FOREIGN_DESCRIPTOR: u8 = 102;
    /// Changes nothing, but may be a 32-bit call of that number, which does.
    pub const MAYBE_COMPAT: u8 = 100;
    /// `io_submit`.
    pub const AIO: u8 = 11;
}

/// Numbers that are looked at one by one.
pub mod nr {
    pub const WRITE: u32 = 1;
    pub const OPEN: u32 = 2;
    pub const MMAP: u32 = 9;
    pub const PWRITE64: u32 = 18;
    pub const WRITEV: u32 = 20;
    pub const MADVISE: u32 = 28;
    pub const SENDMSG: u32 = 46;
    pub const BIND: u32 = 49;
    pub const FTRUNCATE: u32 = 77;
    pub const CREAT: u32 = 85;
    pub const SYMLINK: u32 = 88;
    pub const ACCT: u32 = 163;
    pub const FUTIMESAT: u32 = 261;
    pub const SYMLINKAT: u32 = 266;
    pub const SPLICE: u32 = 275;
    pub const IO_SUBMIT: u32 = 209;
    pub const UTIMENSAT: u32 = 280;
    pub const FALLOCATE: u32 = 285;
    pub const PWRITEV: u32 = 296;
    pub const OPEN_BY_HANDLE_AT: u32 = 304;
    pub const RENAMEAT2: u32 = 316;
    pub const COPY_FILE_RANGE: u32 = 326;
    pub const PWRITEV2: u32 = 328;
    pub const SENDMMSG: u32 = 307;
    pub const OPENAT2: u32 = 437;
}

/// Numbers beyond this are not followed.
pub const CALLS: usize = 512;

/// [`class`] by number.
pub static CLASS: [u8; CALLS] = classes();

/// Where the paths of a call are, by number: four times four bits, argument of directory 1, path
/// 1, directory 2, path 2; [`NO_ARG`] without one.
pub static PATHS: [u16; CALLS] = paths();

/// By number of the table of 32-bit programs (`arch/x86/entry/syscalls/syscall_32.tbl`): the same call in
/// the 64-bit table, 0 where it is not followed, or [`SPECIAL`].
pub static COMPAT: [u16; CALLS] = compat();

/// A 32-bit call that has no like in the 64-bit table: `socketcall` (which may bind), the old `mmap`.
pub const SPECIAL: u16 = 0xffff;

/// Numbers of the 32-bit table whose arguments differ: mostly, 64-bit ones come in two halves.
pub mod nr32 {
    pub const PWRITE64: u64 = 181;
    pub const MMAP2: u64 = 192;
    pub const TRUNCATE64: u64 = 193;
    pub const FTRUNCATE64: u64 = 194;
    pub const PWRITEV: u64 = 334;
    pub const PWRITEV2: u64 = 379;
}

/// "No such argument" in [`PATHS`].
pub const NO_ARG: u16 = 7;

const fn classes() -> [u8; CALLS] {
    let mut table = [class::NONE; CALLS];
    set(&mut table, &[1, 18, 20, 296, 328], class::WRITE);
    set(&mut table, &[77, 91, 93, 190, 199, 285], class::DESCRIPTOR);
    set(&mut table, &[3], class::CLOSE);
    set(&mut table, &[2, 85, 257, 304, 437], class::OPEN);
    set(
        &mut table,
        &[
            49, 76, 82, 83, 84, 86, 87, 88, 90, 92, 94, 132, 133, 188, 189, 197, 198, 235, 258, 259, 260,
            261, 263, 264, 265, 266, 268, 280, 316, 452, 463, 466, 469, 163, 167, 155, 165, 166, 429,
        ],
        class::PATH,
    );
    set(&mut table, &[40, 275, 326], class::COPY);
    set(&mut table, &[16], class::IOCTL);
    set(&mut table, &[9], class::MMAP);
    set(&mut table, &[8], class::SEEK);
    // dup dup2 sendmsg fcntl dup3 sendmmsg io_uring_setup io_uring_enter io_uring_register close_range
    set(&mut table, &[32, 33, 46, 72, 292, 307, 425, 426, 427, 436], class::TABLE);
    // process_vm_writev, 64-bit and 32-bit number
    set(&mut table, &[311, 348], class::FOREIGN_STORE);
    // pidfd_getfd
    set(&mut table, &[438], class::FOREIGN_DESCRIPTOR);
    set(&mut table, &[nr::IO_SUBMIT as usize], class::AIO);
    // madvise process_madvise
    set(&mut table, &[28, 440], class::ADVICE);
    // mprotect munmap brk mremap shmat shmdt remap_file_pages pkey_mprotect, and those after
    // which another task may change the memory map, or it is another one: clone fork vfork execve
    // execveat clone3
    set(&mut table, &[10, 11, 12, 25, 30, 67, 216, 329, 56, 57, 58, 59, 322, 435], class::MEMORY);
    // Whether a call is a 32-bit one has to be asked for; that is saved where the number is harmless in both
    // tables. (Those from 424 on are the same in both.)
    let mut i = 0;
    while i < 424 {
        if table[i] == class::NONE && !is_one_of(&HARMLESS_COMPAT, i) {
            table[i] = class::MAYBE_COMPAT;
        }
        i += 1;
    }
    table
}

/// Numbers of frequent 64-bit calls that change nothing as 32-bit calls either
/// (`arch/x86/entry/syscalls/syscall_32.tbl`). 64-bit: read poll rt_sigaction pread64 select sched_yield
/// pause nanosleep alarm connect accept sendto sendmsg recvmsg shutdown fcntl getcwd chdir readlink
/// gettimeofday getrlimit getrusage sysinfo getgid geteuid getegid getppid gettid futex clock_nanosleep
/// epoll_wait epoll_ctl newfstatat pselect6 epoll_pwait getrandom statx. 32-bit: restart_syscall waitpid
/// time break setuid getuid nice ftime kill pipe times prof setgid getgid signal sigsuspend settimeofday
/// getgroups readdir getpriority setpriority profil statfs setitimer lstat fstat iopl sigaltstack
/// getegid32 lgetxattr listxattr llistxattr timer_getoverrun tgkill mq_notify getcpu inotify_init1.
const HARMLESS_COMPAT: [usize; 37] = [
    0, 7, 13, 17, 23, 24, 34, 35, 37, 42, 43, 44, 46, 47, 48, 72, 79, 80, 89, 96, 97, 98, 99, 104, 107, 108,
    110, 186, 202, 230, 232, 233, 262, 270, 281, 318, 332,
];

const fn is_one_of(numbers: &[usize], number: usize) -> bool {
    let mut i = 0;
    while i < numbers.len() {
        if numbers[i] == number {
            return true;
        }
        i += 1;
    }
    false
}

const fn paths() -> [u16; CALLS] {
    let none = pack(NO_ARG, NO_ARG, NO_ARG, NO_ARG);
    let mut table = [none; CALLS];
    // open creat truncate mkdir rmdir unlink chmod chown lchown utime mknod setxattr lsetxattr
    // removexattr lremovexattr utimes acct swapon
    let first = pack(NO_ARG, 0, NO_ARG, NO_ARG);
    fill(
        &mut table,
        &[2, 85, 76, 83, 84, 87, 90, 92, 94, 132, 133, 188, 189, 197, 198, 235, 163, 167],
        first,
    );
    // openat openat2 mkdirat mknodat fchownat futimesat unlinkat fchmodat utimensat fchmodat2
    // setxattrat removexattrat file_setattr
    let second = pack(0, 1, NO_ARG, NO_ARG);
    fill(&mut table, &[257, 437, 258, 259, 260, 261, 263, 268, 280, 452, 463, 466, 469], second);
    // umount2 pivot_root mount move_mount
    fill(&mut table, &[155, 166], first);
    fill(&mut table, &[165], pack(NO_ARG, 1, NO_ARG, NO_ARG));
    fill(&mut table, &[429], pack(0, 1, 2, 3));
    // rename link symlink
    fill(&mut table, &[82, 86, 88], pack(NO_ARG, 0, NO_ARG, 1));
    // renameat linkat renameat2
    fill(&mut table, &[264, 265, 316], pack(0, 1, 2, 3));
    // symlinkat
    fill(&mut table, &[266], pack(NO_ARG, 0, 1, 2));
    // bind: the path stands in the address
    fill(&mut table, &[49], pack(NO_ARG, 1, NO_ARG, NO_ARG));
    table
}

const fn compat() -> [u16; CALLS] {
    const SAME: [(usize, u16); 67] = [
        (4, 1),
        (5, 2),
        (6, 3),
        (8, 85),
        (9, 86),
        (10, 87),
        (14, 133),
        (15, 90),
        (16, 94),
        (19, 8),
        (21, 165),
        (30, 132),
        (38, 82),
        (39, 83),
        (40, 84),
        (51, 163),
        (52, 166),
        (54, 16),
        (83, 88),
        (87, 167),
        (90, SPECIAL),
        (92, 76),
        (93, 77),
        (94, 91),
        (95, 93),
        (102, SPECIAL),
        (140, 8),
        (146, 20),
        (181, 18),
        (182, 92),
        (187, 40),
        (192, 9),
        (193, 76),
        (194, 77),
        (198, 94),
        (207, 93),
        (212, 92),
        (217, 155),
        (219, 28),
        (226, 188),
        (227, 189),
        (228, 190),
        (235, 197),
        (236, 198),
        (237, 199),
        (239, 40),
        (271, 235),
        (295, 257),
        (296, 258),
        (297, 259),
        (298, 260),
        (299, 261),
        (301, 263),
        (302, 264),
        (303, 265),
        (304, 266),
        (306, 268),
        (313, 275),
        (320, 280),
        (324, 285),
        (334, 296),
        (342, 304),
        (353, 316),
        (361, 49),
        (377, 326),
        (379, 328),
        (412, 280),
    ];
    let mut table = [0; CALLS];
    let mut i = 0;
    while i < SAME.len() {
        assert!(!is_one_of(&HARMLESS_COMPAT, SAME[i].0), "what is followed is not harmless");
        table[SAME[i].0] = SAME[i].1;
        i += 1;
    }
    // From here on both tables are one.
    i = 424;
    while i < CALLS {
        table[i] = i as u16;
        i += 1;
    }
    table
}

const fn pack(directory1: u16, path1: u16, directory2: u16, path2: u16) -> u16 {
    directory1 | path1 << 4 | directory2 << 8 | path2 << 12
}

const fn set(table: &mut [u8; CALLS], numbers: &[usize], class: u8) {
    let mut i = 0;
    while i < numbers.len() {
        table[numbers[i]] = class;
        i += 1;
    }
}

const fn fill(table: &mut [u16; CALLS], numbers: &[usize], spec: u16) {
    let mut i = 0;
    while i < numbers.len() {
        table[numbers[i]] = spec;
        i += 1;
    }
}
