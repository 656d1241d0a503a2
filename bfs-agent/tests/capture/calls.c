/*
 * The programs that the capture tests look at: `calls MODE`, in the current directory.
 *
 * Each waits for one byte on its standard input before it does anything, so that the test can
 * choose it first, and ends with the number of the line that failed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                \
	do {                            \
		if (!(condition))       \
			_exit(__LINE__ & 127 ? __LINE__ & 127 : 1); \
	} while (0)

#define SIZE 100000

/* SIZE times 'b' and room for a text, in anonymous memory: only from there go bytes inline. */
static char *bytes, *text;

/* A text that is part of the program's file, copied to where it may go inline from. */
static const char *in_memory(const char *constant)
{
	return strcpy(text, constant);
}

static void go(void)
{
	char byte;
	CHECK(read(0, &byte, 1) == 1);
}

static void one(const char *name)
{
	int fd = open(name, O_CREAT | O_WRONLY, 0644);
	CHECK(fd >= 0);
	CHECK(write(fd, in_memory(name), strlen(name)) == (ssize_t)strlen(name));
	CHECK(close(fd) == 0);
}

static void writes(void)
{
	int fd = open("f", O_CREAT | O_RDWR | O_TRUNC, 0640);
	struct iovec parts[3] = { { "one", 3 }, { "", 0 }, { "three", 5 } };
	CHECK(fd >= 0);
	CHECK(write(fd, in_memory("hello"), 5) == 5);
	CHECK(lseek(fd, 1, SEEK_CUR) == 6);
	CHECK(write(fd, bytes, 1000) == 1000);
	CHECK(lseek(fd, 1, SEEK_CUR) == 1007);
	CHECK(write(fd, bytes, 5000) == 5000);
	CHECK(lseek(fd, 1, SEEK_CUR) == 6008);
	CHECK(write(fd, bytes, SIZE) == SIZE);
	/* This one goes on where the last one ended. */
	CHECK(write(fd, in_memory("on"), 2) == 2);
	CHECK(pwrite(fd, in_memory("middle"), 6, 50) == 6);
	CHECK(writev(fd, parts, 3) == 8);
	CHECK(ftruncate(fd, 77) == 0);
	CHECK(close(fd) == 0);
}

static void appends(void)
{
	int fd = open("f", O_CREAT | O_WRONLY, 0644);
	CHECK(fd >= 0);
	CHECK(write(fd, in_memory("0123456789"), 10) == 10);
	CHECK(close(fd) == 0);
	fd = open("f", O_WRONLY | O_APPEND);
	CHECK(fd >= 0);
	CHECK(write(fd, in_memory("abc"), 3) == 3);
	CHECK(pwrite(fd, in_memory("de"), 2, 1) == 2);
}

static void paths(void)
{
	CHECK(mkdir("d", 0755) == 0);
	one("a");
	CHECK(rename("a", "d/b") == 0);
	CHECK(symlink("d/b", "s") == 0);
	CHECK(link("d/b", "h") == 0);
	CHECK(unlink("h") == 0);
	CHECK(unlinkat(AT_FDCWD, "d/b", 0) == 0);
	CHECK(rmdir("d") == 0);
}

static void failed(void)
{
	int fd;
	CHECK(mkdir(".", 0755) < 0 && errno == EEXIST);
	CHECK(unlink("missing") < 0 && errno == ENOENT);
	CHECK(rename("missing", "other") < 0 && errno == ENOENT);
	CHECK(open("missing/f", O_CREAT | O_WRONLY, 0644) < 0 && errno == ENOENT);
	fd = open("/proc/self/exe", O_RDONLY);
	CHECK(fd >= 0);
	CHECK(write(fd, in_memory("x"), 1) < 0 && errno == EBADF);
	CHECK(ftruncate(fd, 1) < 0);
}

static void fork_exec(void)
{
	int status;
	pid_t child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		execl("/proc/self/exe", "calls", "one", NULL);
		_exit(99);
	}
	CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void *write_in_thread(void *unused)
{
	one("t");
	return unused;
}

static void *exec_in_thread(void *unused)
{
	execl("/proc/self/exe", "calls", "one", NULL);
	return unused;
}

static void in_thread(void *(*start)(void *))
{
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, start, NULL) == 0);
	CHECK(pthread_join(thread, NULL) == 0);
}

static void seccomp(void)
{
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mkdir, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { 4, filter };
	struct stat stat;
	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
	CHECK(syscall(SYS_mkdir, "never", 0755) == 0);
	CHECK(lstat("never", &stat) < 0);
}

/* Each call of these numbers ends with EIO from here on. */
static void answer_with_eio(const int *numbers, int count)
{
	for (int i = 0; i < count; i++) {
		struct sock_filter filter[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, numbers[i], 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EIO),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog program = { 4, filter };
		CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
	}
}

static void disk_errors(void)
{
	const int numbers[] = { SYS_pread64, SYS_fsync, SYS_msync, SYS_sendfile };
	int null = open("/dev/null", O_RDWR), pipes[2];
	int a = open("a", O_CREAT | O_RDWR, 0644), b = open("b", O_CREAT | O_RDWR, 0644);
	int c = open("c", O_CREAT | O_RDWR, 0644), d = open("d", O_CREAT | O_RDWR, 0644);
	char *map;
	CHECK(null >= 0 && a >= 0 && b >= 0 && c >= 0 && d >= 0 && pipe(pipes) == 0);
	CHECK(ftruncate(c, SIZE) == 0);
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, c, 0);
	CHECK(map != MAP_FAILED);
	CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
	answer_with_eio(numbers, 4);
	/* Nothing to do with a file: no pages, no descriptor, or no file. */
	CHECK(pread(null, bytes, 1, 0) < 0 && pread(77, bytes, 1, 0) < 0 && fsync(pipes[1]) < 0);
	/* Another error. */
	CHECK(read(pipes[1], bytes, 1) < 0 && errno == EBADF);
	CHECK(pread(a, bytes, 1, 0) < 0 && errno == EIO);
	CHECK(pread(a, bytes, 1, 0) < 0);
	CHECK(fsync(b) < 0 && msync(map, SIZE, MS_SYNC) < 0 && sendfile(null, d, NULL, 1) < 0);
}

static void compat(void)
{
	int fd = open("f", O_CREAT | O_WRONLY, 0644);
	char *low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	long result;
	CHECK(fd >= 0 && low != MAP_FAILED);
	memcpy(low, "old", 3);
	/* write(fd, low, 3) of the 32-bit table */
	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(4L), "b"((long)fd), "c"(low), "d"(3L)
			 : "memory", "r8", "r9", "r10", "r11");
	CHECK(result == 3);
}

static void fill(void)
{
	int fd = open("f", O_CREAT | O_WRONLY, 0644);
	CHECK(fd >= 0);
	for (int i = 0; i < 100; i++) {
		CHECK(write(fd, bytes, 4096) == 4096);
		CHECK(lseek(fd, 1, SEEK_CUR) > 0);
	}
}

static void fifo(void)
{
	CHECK(mkfifo("p", 0600) == 0);
	CHECK(open("p", O_CREAT | O_WRONLY, 0600) >= 0);
}

/* One write for each byte that comes. */
static void steps(void)
{
	char byte;
	int fd = open("f", O_CREAT | O_WRONLY, 0644);
	CHECK(fd >= 0);
	while (read(0, &byte, 1) == 1)
		CHECK(write(fd, &byte, 1) == 1);
}

int main(int count, char **args)
{
	const char *mode = count > 1 ? args[1] : "";
	bytes = mmap(NULL, 2 * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(bytes != MAP_FAILED);
	memset(bytes, 'b', SIZE);
	text = bytes + SIZE;
	if (strcmp(mode, "one") == 0) {
		one("one");
		return 0;
	}
	go();
	if (strcmp(mode, "writes") == 0)
		writes();
	else if (strcmp(mode, "appends") == 0)
		appends();
	else if (strcmp(mode, "paths") == 0)
		paths();
	else if (strcmp(mode, "failed") == 0)
		failed();
	else if (strcmp(mode, "fork_exec") == 0)
		fork_exec();
	else if (strcmp(mode, "thread") == 0)
		in_thread(write_in_thread);
	else if (strcmp(mode, "exec_in_thread") == 0)
		in_thread(exec_in_thread);
	else if (strcmp(mode, "seccomp") == 0)
		seccomp();
	else if (strcmp(mode, "disk_errors") == 0)
		disk_errors();
	else if (strcmp(mode, "compat") == 0)
		compat();
	else if (strcmp(mode, "fill") == 0)
		fill();
	else if (strcmp(mode, "fifo") == 0)
		fifo();
	else if (strcmp(mode, "steps") == 0)
		steps();
	else
		return 98;
	return 0;
}
