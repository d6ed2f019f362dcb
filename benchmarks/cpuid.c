/* Libraries that choose their kernels by CPUID are told of a CPU without AVX-512, VNNI and AMX.

   An audit library of the dynamic loader (man 7 rtld-audit, LD_AUDIT): la_objopen runs when a library has been mapped, before
   any of its code runs, constructors and IFUNC resolvers included. There each CPUID of the table is overwritten, in memory
   only, by UD2, which is as long and raises SIGILL; the handler answers in its place. benchmarks/cpuid.py writes the table
   and reads its counters. */

#define _GNU_SOURCE
#include <cpuid.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#define MAX_SITES 4096
#define BIT(n) (1u << (n))

struct site {
    uint64_t device, inode, address;   /* of the file; in the file */
    uint64_t patched, asked, masked;   /* written here, read by cpuid.py */
};

static struct site *table;
static size_t sites;
static uintptr_t loaded[MAX_SITES]; /* where each site lies in this process, 0: not patched */
static struct sigaction former;

static const unsigned char CPUID[2] = {0x0f, 0xa2}, UD2[2] = {0x0f, 0x0b};

/* Bits by the Intel SDM, volume 2, CPUID; eax, ebx, ecx, edx. */
static int mask(unsigned leaf, unsigned subleaf, unsigned r[4]) {
    unsigned clear[4] = {0, 0, 0, 0};
    if (leaf == 7 && subleaf == 0) {
        /* F, DQ, IFMA, PF, ER, CD, BW, VL */
        clear[1] = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31);
        /* VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
        clear[2] = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14);
        /* 4VNNIW, 4FMAPS, VP2INTERSECT, AMX-BF16, FP16, AMX-TILE, AMX-INT8 */
        clear[3] = BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25);
    } else if (leaf == 7 && subleaf == 1) {
        /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
        clear[0] = BIT(4) | BIT(5) | BIT(21) | BIT(23);
        /* AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10 */
        clear[3] = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19);
    } else if (leaf == 0xd && subleaf == 0) {
        clear[0] = BIT(5) | BIT(6) | BIT(7) | BIT(17) | BIT(18); /* XCR0: AVX-512 and AMX state */
    } else if (leaf == 0x1d || leaf == 0x1e || leaf == 0x24) { /* AMX tiles, AMX multiply, AVX10 */
        memset(clear, 0xff, sizeof clear);
    }
    int changed = 0;
    for (int i = 0; i < 4; i++) {
        changed |= (r[i] & clear[i]) != 0;
        r[i] &= ~clear[i];
    }
    return changed;
}

static void answer(struct site *site, greg_t *registers) {
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX], r[4];
    __cpuid_count(leaf, subleaf, r[0], r[1], r[2], r[3]);
    if (mask(leaf, subleaf, r)) __atomic_fetch_add(&site->masked, 1, __ATOMIC_RELAXED);
    __atomic_fetch_add(&site->asked, 1, __ATOMIC_RELAXED);
    registers[REG_RAX] = r[0];
    registers[REG_RBX] = r[1];
    registers[REG_RCX] = r[2];
    registers[REG_RDX] = r[3];
    registers[REG_RIP] += sizeof UD2;
}

static void on_sigill(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    for (size_t i = 0; i < sites; i++)
        if (loaded[i] == (uintptr_t)registers[REG_RIP]) {
            answer(table + i, registers);
            return;
        }
    if (former.sa_flags & SA_SIGINFO)
        former.sa_sigaction(number, info, context);
    else if (former.sa_handler == SIG_DFL || former.sa_handler == SIG_IGN)
        sigaction(number, &former, NULL); /* the instruction runs again and ends the process */
    else
        former.sa_handler(number);
}

static void install(void) {
    static int installed;
    if (installed) return;
    /* No SA_ONSTACK: delivery on an alternate stack that someone else set ended in SIGSEGV at an OpenVINO plugin loaded anew. */
    struct sigaction ours = {.sa_sigaction = on_sigill, .sa_flags = SA_SIGINFO};
    installed = sigaction(SIGILL, &ours, &former) == 0;
}

static void patch(size_t i, unsigned char *code) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    void *start = (void *)((uintptr_t)code & -page);
    size_t size = (uintptr_t)code + sizeof UD2 - (uintptr_t)start;
    if (memcmp(code, CPUID, sizeof CPUID) != 0) return;
    if (mprotect(start, size, PROT_READ | PROT_WRITE) != 0) return;
    memcpy(code, UD2, sizeof UD2);
    loaded[i] = (uintptr_t)code;
    if (mprotect(start, size, PROT_READ | PROT_EXEC) != 0) abort();
    table[i].patched = 1;
}

unsigned la_version(unsigned version) {
    (void)version;
    const char *path = getenv("CPUID_SITES");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) return 0;
    sites = (size_t)status.st_size / sizeof *table;
    table = mmap(NULL, (size_t)status.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    return table == MAP_FAILED || sites > MAX_SITES ? 0 : LAV_CURRENT;
}

unsigned la_objopen(struct link_map *map, Lmid_t space, uintptr_t *cookie) {
    (void)space, (void)cookie;
    struct stat status;
    if (stat(map->l_name, &status) != 0) return 0;
    for (size_t i = 0; i < sites; i++)
        if (table[i].device == status.st_dev && table[i].inode == status.st_ino) {
            install();
            patch(i, (unsigned char *)(map->l_addr + table[i].address));
        }
    return 0;
}
