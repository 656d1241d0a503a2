/* A library for LD_PRELOAD: calls that write below FORWARD_BELOW are said to the receiver behind FORWARD_SOCKET, and
 * return when it has answered. */
#define _GNU_SOURCE
#include "forward.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define FDS 4096
#define REAL(result, name, ...) \
    static result (*real_##name)(__VA_ARGS__); \
    if (!real_##name) real_##name = dlsym(RTLD_NEXT, #name)

/* What is known of a descriptor: nothing, that it is none of ours, or its path. */
static char *paths[FDS];
static char other[1];
static const char *below;
static size_t below_len;
/* One connection for each thread; a child has none of its parent's. */
static int generation = 1;
static __thread int sock = -1, sock_generation;

static void after_fork(void) { generation++; }

__attribute__((constructor)) static void begin(void) {
    below = getenv("FORWARD_BELOW");
    below_len = below ? strlen(below) : 0;
    pthread_atfork(NULL, NULL, after_fork);
}

static int connected(void) {
    if (sock >= 0 && sock_generation == generation) return sock;
    REAL(int, close, int);
    if (sock >= 0) real_close(sock);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof address.sun_path, "%s", getenv("FORWARD_SOCKET"));
    sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* Out of the way of programs that close what they did not open. */
    int high = fcntl(sock, F_DUPFD_CLOEXEC, 1000);
    if (high >= 0) {
        real_close(sock);
        sock = high;
    }
    sock_generation = generation;
    if (connect(sock, (void *)&address, sizeof address) != 0) abort();
    return sock;
}

/* Below the directory: what is behind it, else nothing. */
static const char *ours(const char *path) {
    if (!below_len || strncmp(path, below, below_len) != 0) return NULL;
    if (path[below_len] == 0) return path + below_len;
    return path[below_len] == '/' ? path + below_len + 1 : NULL;
}

static void say(uint32_t what, const char *path, uint64_t at, const struct iovec *more, int count, uint64_t len) {
    int saved = errno, to = connected();
    struct head head = {what, strlen(path), at, len};
    struct iovec parts[2 + IOV_MAX / 2] = {{&head, sizeof head}, {(char *)path, head.path_len}};
    if (count > IOV_MAX / 2) abort();
    /* Without what a short write left out. */
    uint64_t rest = len;
    int used = 2;
    for (int i = 0; i < count && rest; i++) {
        parts[used] = more[i];
        if (parts[used].iov_len > rest) parts[used].iov_len = rest;
        rest -= parts[used++].iov_len;
    }
    struct iovec *part = parts;
    while (used > 0) {
        struct msghdr message = {.msg_iov = part, .msg_iovlen = used};
        ssize_t sent = sendmsg(to, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0) abort();
        while (used > 0 && (size_t)sent >= part->iov_len) {
            sent -= part->iov_len;
            part++;
            used--;
        }
        if (used > 0) {
            part->iov_base = (char *)part->iov_base + sent;
            part->iov_len -= sent;
        }
    }
    char answer;
    while (recv(to, &answer, 1, 0) != 1)
        if (errno != EINTR) abort();
    errno = saved;
}

static void say_paths(uint32_t what, const char *path, const char *second) {
    struct iovec more = {(char *)second, strlen(second)};
    say(what, path, 0, &more, 1, more.iov_len);
}

/* The path of what a descriptor has open, in `room`. */
static const char *open_at(int fd, char *room) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, room, PATH_MAX - 1);
    room[len < 0 ? 0 : len] = 0;
    return room;
}

/* The path that a call means, from the root, in `room`. */
static const char *whole(int directory, const char *path, char *room) {
    if (path[0] == '/') return path;
    char start[PATH_MAX];
    if (directory == AT_FDCWD) {
        if (!getcwd(start, sizeof start)) start[0] = 0;
    } else {
        open_at(directory, start);
    }
    while (path[0] == '.' && path[1] == '/') path += 2;
    snprintf(room, 2 * PATH_MAX, "%s/%s", start, path);
    return room;
}

static void forget(int fd) {
    if (fd >= 0 && fd < FDS) {
        if (paths[fd] != other) free(paths[fd]);
        paths[fd] = NULL;
    }
}

static const char *path_of(int fd) {
    if (fd < 0 || fd >= FDS) return NULL;
    if (!paths[fd]) {
        char room[PATH_MAX];
        int saved = errno;
        const char *path = ours(open_at(fd, room));
        paths[fd] = path ? strdup(path) : other;
        errno = saved;
    }
    return paths[fd] == other ? NULL : paths[fd];
}

static void wrote(int fd, const struct iovec *parts, int count, ssize_t done, int64_t at) {
    const char *path = done > 0 ? path_of(fd) : NULL;
    if (!path) return;
    if (at < 0) at = lseek(fd, 0, SEEK_CUR) - done;
    say(WRITE, path, at, parts, count, done);
}

ssize_t write(int fd, const void *bytes, size_t len) {
    REAL(ssize_t, write, int, const void *, size_t);
    ssize_t done = real_write(fd, bytes, len);
    struct iovec part = {(void *)bytes, len};
    wrote(fd, &part, 1, done, -1);
    return done;
}

ssize_t pwrite64(int fd, const void *bytes, size_t len, off64_t at) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    ssize_t done = real_pwrite64(fd, bytes, len, at);
    struct iovec part = {(void *)bytes, len};
    wrote(fd, &part, 1, done, at);
    return done;
}

ssize_t pwrite(int fd, const void *bytes, size_t len, off_t at) { return pwrite64(fd, bytes, len, at); }

ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int);
    ssize_t done = real_writev(fd, parts, count);
    wrote(fd, parts, count, done, -1);
    return done;
}

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t at) {
    REAL(ssize_t, pwritev64, int, const struct iovec *, int, off64_t);
    ssize_t done = real_pwritev64(fd, parts, count, at);
    wrote(fd, parts, count, done, at);
    return done;
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) { return pwritev64(fd, parts, count, at); }

static int opened(int fd, int flags) {
    forget(fd);
    if (fd >= 0 && (flags & (O_CREAT | O_TRUNC))) {
        const char *path = path_of(fd);
        if (path) say(flags & O_TRUNC ? TRUNCATE_OPEN : CREATE, path, 0, NULL, 0, 0);
    }
    return fd;
}

static mode_t mode_of(int flags, va_list rest) {
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, mode_t) : 0;
}

int openat64(int directory, const char *path, int flags, ...) {
    REAL(int, openat64, int, const char *, int, ...);
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return opened(real_openat64(directory, path, flags, mode), flags);
}

int openat(int directory, const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return openat64(directory, path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return openat64(AT_FDCWD, path, flags, mode);
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = mode_of(flags, rest);
    va_end(rest);
    return openat64(AT_FDCWD, path, flags, mode);
}

int creat(const char *path, mode_t mode) { return openat64(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

int close(int fd) {
    REAL(int, close, int);
    forget(fd);
    return real_close(fd);
}

int dup2(int from, int to) {
    REAL(int, dup2, int, int);
    forget(to);
    return real_dup2(from, to);
}

int dup3(int from, int to, int flags) {
    REAL(int, dup3, int, int, int);
    forget(to);
    return real_dup3(from, to, flags);
}

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned);
    char rooms[2][2 * PATH_MAX];
    const char *was = ours(whole(from_at, from, rooms[0])), *is = ours(whole(to_at, to, rooms[1]));
    int done = real_renameat2(from_at, from, to_at, to, flags);
    if (done == 0 && was && is) {
        /* Paths of descriptors below have changed. */
        for (int fd = 0; fd < FDS; fd++) forget(fd);
        say_paths(RENAME, was, is);
    }
    return done;
}

int renameat(int from_at, const char *from, int to_at, const char *to) { return renameat2(from_at, from, to_at, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int directory, const char *name, int flags) {
    REAL(int, unlinkat, int, const char *, int);
    char room[2 * PATH_MAX];
    const char *path = ours(whole(directory, name, room));
    int done = real_unlinkat(directory, name, flags);
    if (done == 0 && path) say(flags & AT_REMOVEDIR ? RMDIR : UNLINK, path, 0, NULL, 0, 0);
    return done;
}

int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int directory, const char *name, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t);
    char room[2 * PATH_MAX];
    const char *path = ours(whole(directory, name, room));
    int done = real_mkdirat(directory, name, mode);
    if (done == 0 && path) say(MKDIR, path, mode, NULL, 0, 0);
    return done;
}

int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }

int ftruncate64(int fd, off64_t len) {
    REAL(int, ftruncate64, int, off64_t);
    int done = real_ftruncate64(fd, len);
    const char *path = done == 0 ? path_of(fd) : NULL;
    if (path) say(TRUNCATE, path, len, NULL, 0, 0);
    return done;
}

int ftruncate(int fd, off_t len) { return ftruncate64(fd, len); }

int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int);
    char rooms[2][2 * PATH_MAX];
    const char *was = ours(whole(from_at, from, rooms[0])), *is = ours(whole(to_at, to, rooms[1]));
    int done = real_linkat(from_at, from, to_at, to, flags);
    if (done == 0 && was && is) say_paths(LINK, was, is);
    return done;
}

int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int symlinkat(const char *target, int directory, const char *name) {
    REAL(int, symlinkat, const char *, int, const char *);
    char room[2 * PATH_MAX];
    const char *path = ours(whole(directory, name, room));
    int done = real_symlinkat(target, directory, name);
    if (done == 0 && path) say_paths(SYMLINK, path, target);
    return done;
}

int symlink(const char *target, const char *name) { return symlinkat(target, AT_FDCWD, name); }
