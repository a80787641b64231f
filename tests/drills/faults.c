/* Stands before the C library (LD_PRELOAD) and lets the N-th call that changes a directory fail, or kills the process.

   Counted are calls that write, sync, make, rename or remove files below the directory given to `faults_arm`; before
   that, and for all other files, every call goes through untouched. What happens at the calls [when, when + span):

     COUNT   nothing: calls are only counted, and written to the log
     KILL    SIGKILL instead of the call
     TORN    of a write, half is written; then SIGKILL
     FAIL    the call returns -1 with errno `error`; if that says that there is no room, removing still works
     SHORT   a write takes half of what it was given, and says so

   The log (a file elsewhere) has a line per call: its number, kind and path.

   Renaming is also done past the C library, by Rust's rustix for safetensors: so a filter (seccomp) hands every rename
   of the process to a handler here. x86-64 Linux. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { COUNT, KILL, TORN, FAIL, SHORT };
enum { THROUGH, FAILS, HALF, HALF_THEN_KILL };
enum { OURS = 0x6c6c616d }; /* as a sixth argument, which no rename has: a call of the handler's */

static char directory[PATH_MAX];
static size_t directory_length; /* 0: not armed */
static int log_file = -1;
static long when, span, calls;
static int action, error_number;

static int filter_renames(void);

int faults_arm(const char *below, const char *log_path, int what, int error, long first, long so_many) {
    log_file = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_file < 0 || strlen(below) >= sizeof directory) return -1;
    action = what, error_number = error, when = first, span = so_many, calls = 0;
    strcpy(directory, below);
    directory_length = strlen(below);
    return filter_renames();
}

static int is_below(const char *path) {
    return !strncmp(path, directory, directory_length) && (path[directory_length] == '/' || !path[directory_length]);
}

static int path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) pause();
}

/* What is to become of a call of this kind on `name` (relative to the directory open as `at`). */
static int judge_at(const char *kind, int at, const char *name) {
    char path[2 * PATH_MAX];
    if (!directory_length || !name) return THROUGH;
    if (name[0] == '/') {
        snprintf(path, sizeof path, "%s", name);
    } else if (at == AT_FDCWD || !path_of(at, path)) {
        return THROUGH;
    } else if (*name) {
        size_t length = strlen(path);
        snprintf(path + length, sizeof path - length, "/%s", name);
    }
    if (!is_below(path)) return THROUGH;
    long number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    char line[2 * PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", number, kind, path);
    syscall(SYS_write, log_file, line, length);
    if (action == COUNT || number < when || number - when >= span) return THROUGH;
    int writes = !strcmp(kind, "write");
    if (action == SHORT) return writes ? HALF : THROUGH;
    if (action == TORN && writes) return HALF_THEN_KILL;
    if (action != FAIL) die();
    int removes = !strcmp(kind, "unlink") || !strcmp(kind, "rmdir");
    return removes && error_number != EIO ? THROUGH : FAILS;
}

static int judge(const char *kind, int descriptor) {
    char path[PATH_MAX];
    if (!directory_length || descriptor == log_file || !path_of(descriptor, path)) return THROUGH;
    return judge_at(kind, AT_FDCWD, path);
}

static long fails(void) {
    errno = error_number;
    return -1;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name);

#define WRITES(name, parameters, half, whole, ...) \
    ssize_t name parameters { \
        REAL(ssize_t, name, __VA_ARGS__) \
        int verdict = judge("write", descriptor); \
        if (verdict == FAILS) return fails(); \
        if (verdict == THROUGH) return real whole; \
        ssize_t done = real half; \
        if (verdict == HALF_THEN_KILL) die(); \
        return done; \
    }

WRITES(write, (int descriptor, const void *bytes, size_t n), (descriptor, bytes, (n + 1) / 2), (descriptor, bytes, n),
       int, const void *, size_t)
WRITES(pwrite, (int descriptor, const void *bytes, size_t n, off_t at), (descriptor, bytes, (n + 1) / 2, at),
       (descriptor, bytes, n, at), int, const void *, size_t, off_t)
WRITES(pwrite64, (int descriptor, const void *bytes, size_t n, off64_t at), (descriptor, bytes, (n + 1) / 2, at),
       (descriptor, bytes, n, at), int, const void *, size_t, off64_t)
WRITES(writev, (int descriptor, const struct iovec *parts, int n), (descriptor, parts, (n + 1) / 2),
       (descriptor, parts, n), int, const struct iovec *, int)

#define ON_DESCRIPTOR(name, kind, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__) \
        return judge(kind, descriptor) == FAILS ? fails() : real arguments; \
    }

ON_DESCRIPTOR(fsync, "fsync", (int descriptor), (descriptor), int)
ON_DESCRIPTOR(fdatasync, "fsync", (int descriptor), (descriptor), int)
ON_DESCRIPTOR(ftruncate, "ftruncate", (int descriptor, off_t length), (descriptor, length), int, off_t)
ON_DESCRIPTOR(ftruncate64, "ftruncate", (int descriptor, off64_t length), (descriptor, length), int, off64_t)
ON_DESCRIPTOR(fallocate, "fallocate", (int descriptor, int mode, off_t at, off_t n), (descriptor, mode, at, n), int,
              int, off_t, off_t)
ON_DESCRIPTOR(fallocate64, "fallocate", (int descriptor, int mode, off64_t at, off64_t n), (descriptor, mode, at, n),
              int, int, off64_t, off64_t)

#define ON_PATH(name, kind, at, path, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__) \
        return judge_at(kind, at, path) == FAILS ? fails() : real arguments; \
    }

ON_PATH(truncate, "ftruncate", AT_FDCWD, path, (const char *path, off_t n), (path, n), const char *, off_t)
ON_PATH(truncate64, "ftruncate", AT_FDCWD, path, (const char *path, off64_t n), (path, n), const char *, off64_t)
ON_PATH(mkdir, "mkdir", AT_FDCWD, path, (const char *path, mode_t mode), (path, mode), const char *, mode_t)
ON_PATH(mkdirat, "mkdir", at, path, (int at, const char *path, mode_t mode), (at, path, mode), int, const char *,
        mode_t)
ON_PATH(rmdir, "rmdir", AT_FDCWD, path, (const char *path), (path), const char *)
ON_PATH(unlink, "unlink", AT_FDCWD, path, (const char *path), (path), const char *)
ON_PATH(unlinkat, flags &AT_REMOVEDIR ? "rmdir" : "unlink", at, path, (int at, const char *path, int flags),
        (at, path, flags), int, const char *, int)

#define OPENS(name, at, parameters, arguments, ...) \
    int name parameters { \
        REAL(int, name, __VA_ARGS__, mode_t) \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        if (flags & (O_CREAT | O_TRUNC) && judge_at("open", at, path) == FAILS) return fails(); \
        return real arguments; \
    }

OPENS(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode), const char *, int)
OPENS(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode), const char *, int)
OPENS(openat, at, (int at, const char *path, int flags, ...), (at, path, flags, mode), int, const char *, int)
OPENS(openat64, at, (int at, const char *path, int flags, ...), (at, path, flags, mode), int, const char *, int)

/* Renames, by whatever way they come. */
static void renames(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    int plain = info->si_syscall == SYS_rename;
    const char *to = (const char *)(plain ? r[REG_RSI] : r[REG_R10]);
    int verdict = judge_at("rename", plain ? AT_FDCWD : (int)r[REG_RDX], to);
    long done = verdict == FAILS
        ? -1
        : syscall(info->si_syscall, r[REG_RDI], r[REG_RSI], r[REG_RDX], r[REG_R10], r[REG_R8], (long)OURS);
    r[REG_RAX] = done < 0 ? -(verdict == FAILS ? error_number : errno) : done;
    (void)number;
}

/* Processes that this one starts inherit the filter: they have the handler too, as this is preloaded there. */
__attribute__((constructor)) static void handle_renames(void) {
    struct sigaction handler = {.sa_sigaction = renames, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSYS, &handler, NULL);
}

static int filter_renames(void) {
    struct sock_filter program[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rename, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat2, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OURS, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
    };
    struct sock_fprog filter = {sizeof program / sizeof *program, program};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return -1;
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter);
}
