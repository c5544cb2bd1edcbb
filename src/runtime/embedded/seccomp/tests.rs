use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use syscalls::x86_64;

use super::architecture::{AARCH64, X86_64};
use super::profile::errno_verdict;
use super::tree::ARGUMENTS;
use super::*;

const PROFILE: &str = include_str!("../../../../config/seccomp.json");
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
const HIGH: u64 = 1 << 32;

fn errno(number: i32) -> u32 {
    errno_verdict(number as u32)
}

/// What the kernel would see of a call.
#[derive(Clone, Copy, Debug)]
struct Call {
    audit: u32,
    number: u32,
    arguments: [u64; ARGUMENTS],
}

impl Call {
    /// The 32 bits at `offset` of `struct seccomp_data`, little-endian.
    fn load(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.audit,
            16..64 => (self.arguments[(offset as usize - 16) / 8] >> (offset % 8 * 8)) as u32,
            _ => panic!("load at {offset}"),
        }
    }
}

/// Runs a program as the kernel does, but panics where the kernel's checker would have refused it.
fn emulate(program: &Program, call: Call) -> u32 {
    let (mut accumulator, mut position) = (0_u32, 0_usize);
    loop {
        let sock_filter { code, jt, jf, k } = program.filter[position];
        let branch = |yes: bool| usize::from(if yes { jt } else { jf });
        position += 1;
        // The codes of linux/bpf_common.h, on purpose not spelt as in the assembler.
        match code {
            0x20 => accumulator = call.load(k),
            0x54 => accumulator &= k,
            0x05 => position += k as usize,
            0x15 => position += branch(accumulator == k),
            0x25 => position += branch(accumulator > k),
            0x35 => position += branch(accumulator >= k),
            0x45 => position += branch(accumulator & k != 0),
            0x06 => return k,
            _ => panic!("instruction {code:#x}"),
        }
    }
}

fn holds(comparison: &Value, call: Call) -> bool {
    let argument = call.arguments[comparison["index"].as_u64().unwrap() as usize];
    let value = comparison["value"].as_u64().unwrap();
    match comparison["op"].as_str().unwrap() {
        "SCMP_CMP_NE" => argument != value,
        "SCMP_CMP_LT" => argument < value,
        "SCMP_CMP_LE" => argument <= value,
        "SCMP_CMP_EQ" => argument == value,
        "SCMP_CMP_GE" => argument >= value,
        "SCMP_CMP_GT" => argument > value,
        "SCMP_CMP_MASKED_EQ" => argument & value == comparison["valueTwo"].as_u64().unwrap(),
        op => panic!("{op}"),
    }
}

fn verdict(action: &Value, errno_ret: &Value) -> u32 {
    match action.as_str().unwrap() {
        "SCMP_ACT_ALLOW" => ALLOW,
        "SCMP_ACT_ERRNO" => errno(errno_ret.as_u64().unwrap() as i32),
        action => panic!("{action}"),
    }
}

/// A compiled profile together with what its JSON says, to be compared call by call.
struct Comparer {
    architecture: &'static Architecture,
    default: u32,
    entries: BTreeMap<u32, Vec<Value>>,
    program: Program,
    cases: usize,
}

impl Comparer {
    fn new(architecture: &'static Architecture, json: &str) -> Comparer {
        let program = Program::compile_for(architecture, json).unwrap();
        let profile: Value = serde_json::from_str(json).unwrap();
        let mut entries: BTreeMap<u32, Vec<Value>> = BTreeMap::new();
        for entry in profile["syscalls"].as_array().unwrap() {
            let names = entry["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap());
            for number in names.filter_map(|name| architecture.number(name).unwrap()) {
                entries.entry(number).or_default().push(entry.clone());
            }
        }
        let default = verdict(&profile["defaultAction"], &profile["defaultErrnoRet"]);
        Comparer { architecture, default, entries, program, cases: 0 }
    }

    /// The verdict straight from the JSON: that of the first entry whose comparisons all hold.
    fn expected(&self, call: Call) -> u32 {
        if call.audit != self.architecture.audit {
            return KILL;
        }
        if self.architecture.numbers_end.is_some_and(|end| call.number >= end) {
            return errno(libc::ENOSYS);
        }
        let matches = |entry: &&Value| {
            entry["args"].as_array().is_none_or(|args| args.iter().all(|one| holds(one, call)))
        };
        let entry = self.entries.get(&call.number).and_then(|entries| entries.iter().find(matches));
        entry.map_or(self.default, |entry| verdict(&entry["action"], &entry["errnoRet"]))
    }

    fn compare(&mut self, call: Call) {
        assert_eq!(emulate(&self.program, call), self.expected(call), "{call:x?}");
        self.cases += 1;
    }

    fn compare_native(&mut self, number: u32, arguments: [u64; ARGUMENTS]) {
        self.compare(Call { audit: self.architecture.audit, number, arguments });
    }

    /// Every number that can matter, with a few arguments, on this and on other architectures.
    fn compare_numbers(&mut self) {
        let edges = [4095, 0x3fff_ffff, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, u32::MAX];
        let x32 = (0..600).map(|number| 0x4000_0000 + number);
        for number in (0..600).chain(edges).chain(x32) {
            for fill in [0, 1, 2, 35, 0x5412, 0x7e02_0000, HIGH, u64::MAX] {
                self.compare_native(number, [fill; ARGUMENTS]);
            }
            for audit in [
                0,
                0x4000_0003,
                X86_64.audit ^ AARCH64.audit ^ self.architecture.audit,
                self.architecture.audit + 1,
            ] {
                self.compare(Call { audit, number, arguments: [0; ARGUMENTS] });
            }
        }
    }

    /// Each call with conditions, with every argument that its conditions make interesting.
    fn compare_conditions(&mut self) {
        for (number, values) in self.interesting() {
            for (index, own) in values.iter().enumerate().filter(|(_, own)| own.len() > 1) {
                // Together with a few values of the other arguments.
                for other in values
                    .iter()
                    .enumerate()
                    .filter(|(other, _)| *other != index)
                    .flat_map(|(_, v)| v)
                    .take(40)
                {
                    for value in own {
                        let mut arguments = [*other; ARGUMENTS];
                        arguments[index] = *value;
                        self.compare_native(number, arguments);
                    }
                }
            }
        }
    }

    /// For each call with conditions and each argument: the compared values and what lies around them.
    fn interesting(&self) -> BTreeMap<u32, [BTreeSet<u64>; ARGUMENTS]> {
        let mut calls: BTreeMap<u32, [BTreeSet<u64>; ARGUMENTS]> = BTreeMap::new();
        let comparisons = |entry: &Value| entry["args"].as_array().cloned().unwrap_or_default();
        for (number, entries) in &self.entries {
            for comparison in entries.iter().flat_map(comparisons) {
                let values =
                    calls.entry(*number).or_insert_with(|| std::array::from_fn(|_| BTreeSet::from([0])));
                let index = comparison["index"].as_u64().unwrap() as usize;
                for key in ["value", "valueTwo"] {
                    values[index].extend(around(comparison[key].as_u64().unwrap_or(0)));
                }
            }
        }
        calls
    }
}

/// A value, its neighbours, those with one bit turned, and each of them with the upper half set.
fn around(value: u64) -> impl Iterator<Item = u64> {
    let turned = (0..64).map(move |bit| value ^ (1 << bit));
    let near = [value, value.wrapping_sub(1), value.wrapping_add(1), !value, value << 32];
    near.into_iter().chain(turned).flat_map(|value| [value, value | HIGH, value | 0xffff_ffff << 32])
}

fn random_numbers(mut state: u64) -> impl FnMut() -> u64 {
    // SplitMix64.
    move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[test]
fn program_agrees_with_the_profile() {
    for architecture in [&X86_64, &AARCH64] {
        let mut comparer = Comparer::new(architecture, PROFILE);
        comparer.compare_numbers();
        comparer.compare_conditions();
        let ioctl = architecture.number("ioctl").unwrap().unwrap();
        (0..=0xffff).for_each(|request| comparer.compare_native(ioctl, [0, request, 0, 0, 0, 0]));
        println!(
            "{}: {} cases, {} instructions",
            architecture.oci_name,
            comparer.cases,
            comparer.program.len()
        );
        assert!(comparer.cases > 20_000);
    }
}

#[test]
fn any_mixture_of_conditions_agrees_with_its_profile() {
    let mut random = random_numbers(1);
    let (mut compiled, mut comparer_cases) = (0, 0);
    for _ in 0..3_000 {
        let profile = random_profile(&mut random).to_string();
        match Program::compile_for(&X86_64, &profile) {
            Ok(_) => compiled += 1,
            Err(ProfileError::Conflict(_) | ProfileError::Condition { .. }) => continue,
            Err(error) => panic!("{error}: {profile}"),
        }
        let mut comparer = Comparer::new(&X86_64, &profile);
        for _ in 0..50 {
            let arguments = std::array::from_fn(|_| random_value(&mut random));
            comparer.compare_native(random() as u32 % 4, arguments);
        }
        comparer_cases += comparer.cases;
    }
    println!("{compiled} random profiles compiled, {comparer_cases} cases");
    assert!(compiled > 500);
}

/// Up to four entries for the calls 0 to 2, with conditions of every kind.
fn random_profile(random: &mut impl FnMut() -> u64) -> Value {
    let operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ", "MASKED_EQ"];
    let mut entry = || {
        let name = ["read", "write", "open"][random() as usize % 3];
        let args: Vec<Value> = (0..random() % 3)
            .map(|index| {
                let (op, value) = (operators[random() as usize % 8], random_value(random));
                let two = random_value(random) & value;
                json!({ "index": index, "op": format!("SCMP_CMP_{op}"), "value": value, "valueTwo": two })
            })
            .collect();
        json!({ "names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": random() % 2, "args": args })
    };
    let entries: Vec<Value> = (0..4).map(|_| entry()).collect();
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": entries })
}

/// Small numbers and edges, so that comparisons are often met.
fn random_value(random: &mut impl FnMut() -> u64) -> u64 {
    let edges = [0, u64::MAX, HIGH, HIGH - 1, 0xffff_0000, 0x7e02_0000, 0xf0f0];
    match random() % 4 {
        0 => edges[random() as usize % edges.len()],
        1 => random() % 4 + (random() % 2) * HIGH,
        2 => 1 << (random() % 64),
        _ => random() % 8,
    }
}

#[test]
fn program_is_small() {
    for architecture in [&X86_64, &AARCH64] {
        // 168 and 151 when this was written; the kernel would take 4096.
        assert!(Program::compile_for(architecture, PROFILE).unwrap().len() < 250);
    }
}

/// The native program's verdict on a call by name.
fn verdict_on(name: &str, arguments: &[u64]) -> u32 {
    let program = Program::compile(PROFILE).unwrap();
    let number = NATIVE.number(name).unwrap().expect("the call exists here");
    let mut all = [0; ARGUMENTS];
    all[..arguments.len()].copy_from_slice(arguments);
    emulate(&program, Call { audit: NATIVE.audit, number, arguments: all })
}

#[test]
fn known_denied_calls_get_eperm() {
    let denied = "ptrace process_vm_readv process_vm_writev pidfd_getfd process_madvise keyctl add_key request_key \
        unshare setns mount umount2 move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick \
        mount_setattr pivot_root chroot io_uring_setup io_uring_enter io_uring_register bpf perf_event_open \
        userfaultfd open_by_handle_at name_to_handle_at kexec_load kexec_file_load init_module finit_module \
        delete_module reboot swapon swapoff acct quotactl quotactl_fd settimeofday clock_settime \
        clock_adjtime adjtimex sethostname setdomainname lookup_dcookie nfsservctl vhangup syslog move_pages \
        migrate_pages mbind set_mempolicy get_mempolicy set_mempolicy_home_node kcmp fanotify_init \
        fanotify_mark statmount listmount listns lsm_set_self_attr memfd_secret io_setup sync syncfs";
    for name in denied.split_whitespace() {
        assert_eq!(verdict_on(name, &[]), errno(libc::EPERM), "{name}");
    }
}

#[test]
fn unknown_calls_get_enosys() {
    // clone3 by intent: only that answer makes glibc fall back to clone.
    assert_eq!(verdict_on("clone3", &[]), errno(libc::ENOSYS));
    let program = Program::compile(PROFILE).unwrap();
    for number in [472, 512, 1 << 20, 0x3fff_ffff, 0x4000_0000, u32::MAX] {
        let call = Call { audit: NATIVE.audit, number, arguments: [0; ARGUMENTS] };
        assert_eq!(emulate(&program, call), errno(libc::ENOSYS), "{number}");
    }
}

#[test]
fn other_architectures_are_killed() {
    let program = Program::compile_for(&X86_64, PROFILE).unwrap();
    for audit in [0x4000_0003, AARCH64.audit, 0] {
        assert_eq!(emulate(&program, Call { audit, number: 1, arguments: [0; ARGUMENTS] }), KILL);
    }
}

/// Each condition's good and bad arguments; `verdict_on` takes the rest for zero.
#[test]
fn conditions_tell_good_arguments_from_bad() {
    const EPERM: i32 = libc::EPERM;
    const EAFNOSUPPORT: i32 = libc::EAFNOSUPPORT;
    const THREAD: u64 = 0x3d_0f00;
    let good: &[(&str, &[&[u64]])] = &[
        ("clone", &[&[THREAD], &[17], &[0x0120_0011], &[0x80], &[THREAD | HIGH]]),
        ("socket", &[&[1], &[2], &[10]]),
        ("socketpair", &[&[1]]),
        ("personality", &[&[0], &[0xffff_ffff], &[u64::MAX]]),
        ("prlimit64", &[&[0], &[0, 7]]),
        ("sched_setaffinity", &[&[0, 128]]),
        ("sched_setscheduler", &[&[0]]),
        ("sched_setparam", &[&[0]]),
        ("sched_setattr", &[&[0]]),
        ("setpriority", &[&[0, 0, 10]]),
        ("ioprio_set", &[&[1, 0, 7]]),
        ("ioctl", &[&[0, 0x5401], &[1, 0x5413], &[3, 0x5421], &[3, 0x4004_9409], &[3, 0x5411], &[3, 0x8912]]),
        ("mmap", &[&[0, 4096, 3, 0x22], &[0, 4096, 3, 0x2]]),
        ("memfd_create", &[&[0, 1]]),
        (
            "setsockopt",
            &[
                &[3, 1, 2],
                &[3, 1, 9],
                &[3, 1, 25],
                &[3, 1, 27],
                &[3, 1, 49],
                &[3, 1, 53],
                &[3, 6, 1],
                &[3, 41, 26],
            ],
        ),
        ("prctl", &[&[1, 9], &[15], &[21], &[23], &[34], &[36], &[38], &[0x5356_4d41], &[0x5961_6d61]]),
    ];
    let bad: &[(&str, i32, &[&[u64]])] = &[
        (
            "socket",
            EAFNOSUPPORT,
            &[&[0], &[3], &[9], &[11], &[16], &[17], &[38], &[40], &[16 | HIGH], &[1 | HIGH]],
        ),
        ("socketpair", EAFNOSUPPORT, &[&[0], &[2], &[10], &[16]]),
        ("personality", libc::ENOSYS, &[&[8], &[0x4_0000], &[0x40_0000], &[0x4_0000 | HIGH]]),
        ("prlimit64", EPERM, &[&[1], &[2], &[HIGH], &[1 | HIGH], &[u64::MAX]]),
        ("sched_setaffinity", EPERM, &[&[1], &[HIGH]]),
        ("sched_setscheduler", EPERM, &[&[1], &[HIGH]]),
        ("sched_setparam", EPERM, &[&[1], &[HIGH]]),
        ("sched_setattr", EPERM, &[&[1], &[HIGH]]),
        ("setpriority", EPERM, &[&[0, 1], &[1, 0], &[2, 0], &[2, 1], &[0, HIGH], &[HIGH, 1]]),
        ("ioprio_set", EPERM, &[&[0, 0], &[1, 1], &[2, 0], &[3, 0], &[1, HIGH], &[1 | HIGH, 1]]),
        (
            "ioctl",
            EPERM,
            &[&[0, 0x5412], &[0, 0x541c], &[0, 0x5423], &[0, 0x5412 | HIGH], &[0, 0x541c | HIGH << 31]],
        ),
        ("mmap", EPERM, &[&[0, 4096, 3, 0x40022], &[0, 4096, 3, 0x40022 | HIGH]]),
        ("memfd_create", EPERM, &[&[0, 4], &[0, 5]]),
        (
            "setsockopt",
            EPERM,
            &[&[3, 1, 26], &[3, 1, 50], &[3, 1, 51], &[3, 1, 52], &[3, 1 | HIGH, 26], &[3, 1, 26 | HIGH]],
        ),
        ("prctl", EPERM, &[&[22], &[22 | HIGH], &[35], &[35 | HIGH], &[35 | HIGH << 31]]),
    ];
    for (name, arguments) in good.iter().flat_map(|(name, all)| all.iter().map(move |one| (name, one))) {
        assert_eq!(verdict_on(name, arguments), ALLOW, "{name} {arguments:x?}");
    }
    for (name, number, all) in bad {
        all.iter().for_each(|one| assert_eq!(verdict_on(name, one), errno(*number), "{name} {one:x?}"));
    }
}

#[test]
fn clone_makes_no_namespace() {
    for bit in 0..64 {
        let namespace = [17, 25, 26, 27, 28, 29, 30].contains(&bit);
        let expected = if namespace { errno(libc::EPERM) } else { ALLOW };
        assert_eq!(verdict_on("clone", &[1 << bit]), expected, "bit {bit}");
        assert_eq!(verdict_on("clone", &[1 << bit | 0x3d_0f00 | HIGH]), expected, "bit {bit} among others");
    }
}

#[test]
fn far_jumps_reach_their_targets() {
    // Each of the calls 0 to 99 refuses three arguments with an errno of its own: no two share code.
    let names = (0..100).filter_map(x86_64::Sysno::new).map(|call| call.name());
    let entries = names.enumerate().flat_map(|(errno, name)| {
        [5, 6 * HIGH, 7].map(|value| {
            let args = json!([{ "index": value % 6, "op": "SCMP_CMP_EQ", "value": value }, { "index": 4, "op": "SCMP_CMP_GT", "value": errno }]);
            json!({ "names": [name], "action": "SCMP_ACT_ERRNO", "errnoRet": errno + 100, "args": args })
        })
    });
    let profile = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": entries.collect::<Vec<_>>() });
    let mut comparer = Comparer::new(&X86_64, &profile.to_string());
    assert!(comparer.program.len() > 1_000, "{}", comparer.program.len());
    for number in 0..102 {
        for value in [0, 5, 6 * HIGH, 7, 150, 250] {
            comparer.compare_native(number, [value; ARGUMENTS]);
            comparer.compare_native(number, [5, 7, 0, 0, value, 5]);
        }
    }
}

/// Compiles a profile with one entry.
fn compile_entry(entry: Value) -> Result<Program, ProfileError> {
    compile_entries(json!([entry]))
}

fn compile_entries(entries: Value) -> Result<Program, ProfileError> {
    Program::compile(&json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": entries }).to_string())
}

fn entry(name: &str, action: &str, args: Value) -> Value {
    json!({ "names": [name], "action": action, "args": args })
}

#[test]
fn what_is_not_understood_is_refused() {
    let is_format = |result| matches!(result, Err(ProfileError::Format(_)));
    assert!(is_format(Program::compile("{")));
    assert!(is_format(Program::compile("{}")));
    assert!(is_format(compile_entry(entry("read", "SCMP_ACT_PERMIT", json!([])))));
    assert!(is_format(compile_entry(entry(
        "read",
        "SCMP_ACT_ALLOW",
        json!([{ "index": 0, "op": "==", "value": 1 }])
    ))));
    assert!(is_format(compile_entry(
        json!({ "names": ["read"], "action": "SCMP_ACT_ALLOW", "includes": {} })
    )));
    assert!(is_format(Program::compile(r#"{ "defaultAction": "SCMP_ACT_ALLOW", "flags": [] }"#)));
}

#[test]
fn a_misspelt_call_is_refused() {
    let result = compile_entry(entry("pthrace", "SCMP_ACT_ERRNO", json!([])));
    assert!(matches!(result, Err(ProfileError::UnknownCall(name)) if name == "pthrace"));
}

#[test]
fn a_call_of_another_architecture_is_passed_over() {
    let profile = json!({ "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [entry("open", "SCMP_ACT_ALLOW", json!([]))] });
    let program = Program::compile_for(&AARCH64, &profile.to_string()).unwrap();
    let nothing = json!({ "defaultAction": "SCMP_ACT_ERRNO" }).to_string();
    assert_eq!(program.len(), Program::compile_for(&AARCH64, &nothing).unwrap().len());
}

#[test]
fn a_profile_for_another_architecture_is_refused() {
    let profile = r#"{ "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_S390X"] }"#;
    assert!(matches!(Program::compile(profile), Err(ProfileError::Architecture(_))));
}

#[test]
fn an_errno_beyond_the_kernels_range_is_refused() {
    let result = compile_entry(json!({ "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 4096 }));
    assert!(matches!(result, Err(ProfileError::Errno(4096))));
}

#[test]
fn a_condition_without_meaning_is_refused() {
    let bad = [
        json!([{ "index": 6, "op": "SCMP_CMP_EQ", "value": 1 }]),
        json!([{ "index": 0, "op": "SCMP_CMP_LT", "value": 0 }]),
        json!([{ "index": 0, "op": "SCMP_CMP_GT", "value": u64::MAX }]),
        json!([{ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 2, "valueTwo": 3 }]),
        json!([{ "index": 0, "op": "SCMP_CMP_GT", "value": 1 }, { "index": 0, "op": "SCMP_CMP_LT", "value": 5 }]),
    ];
    for args in bad {
        let result = compile_entry(entry("read", "SCMP_ACT_ALLOW", args.clone()));
        assert!(matches!(result, Err(ProfileError::Condition { .. })), "{args}");
    }
}

#[test]
fn rules_that_contradict_each_other_are_refused() {
    let equal = |value: u64| json!([{ "index": 0, "op": "SCMP_CMP_EQ", "value": value }]);
    let masked = json!([{ "index": 0, "op": "SCMP_CMP_MASKED_EQ", "value": 0xff, "valueTwo": 35 }]);
    let second = json!([{ "index": 1, "op": "SCMP_CMP_EQ", "value": 3 }]);
    let pairs = [
        (json!([]), json!([]), true),
        (json!([]), equal(3), true),
        (equal(3), equal(3), true),
        (equal(3), equal(4), false),
        (equal(3), second, true),
        (masked.clone(), equal(35 | HIGH), true),
        (masked.clone(), equal(36), false),
        (masked.clone(), json!([{ "index": 0, "op": "SCMP_CMP_NE", "value": 35 }]), true),
        (masked.clone(), json!([{ "index": 0, "op": "SCMP_CMP_LT", "value": 35 }]), false),
        (masked, json!([{ "index": 0, "op": "SCMP_CMP_GE", "value": u64::MAX - 10 }]), false),
    ];
    for (one, two, contradict) in pairs {
        let allow = entry("read", "SCMP_ACT_ALLOW", one.clone());
        let result = compile_entries(json!([allow, entry("read", "SCMP_ACT_ERRNO", two.clone())]));
        assert_eq!(matches!(result, Err(ProfileError::Conflict(_))), contradict, "{one} {two}");
        assert!(compile_entries(json!([allow, entry("read", "SCMP_ACT_ALLOW", two)])).is_ok());
    }
}

#[test]
fn a_program_beyond_the_kernels_limit_is_refused() {
    // A jump and a return for each of 2,100 outcomes.
    let entry = |value: u32| {
        let args = json!([{ "index": 0, "op": "SCMP_CMP_EQ", "value": value }]);
        json!({ "names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": value, "args": args })
    };
    let entries: Vec<Value> = (2..2_102).map(entry).collect();
    assert!(matches!(compile_entries(json!(entries)), Err(ProfileError::TooLong { .. })));
}

/// The exit code of a forked child that runs `body`, which must not allocate: the fork is of a threaded
/// process.
fn exit_code_of(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child makes system calls only and leaves by _exit, running nothing else of the test's.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let code = body();
        // SAFETY: as above.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFEXITED(status), "the child was killed: {status:#x}");
    libc::WEXITSTATUS(status)
}

#[test]
fn the_kernel_enforces_the_program() {
    let program = Program::compile(PROFILE).unwrap();
    assert_eq!(
        exit_code_of(|| first_failure_under(&program)),
        0,
        "the number of the first check that failed"
    );
}

/// 0 when all is as it should be.
fn first_failure_under(program: &Program) -> i32 {
    const TIOCSTI: u64 = 0x5412;
    // SAFETY: takes integers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 || program.install().is_err() {
        return 100;
    }
    let failed = |errno: i32, result: libc::c_long| {
        result != -1 || io::Error::last_os_error().raw_os_error() != Some(errno)
    };
    // SAFETY: every pointer is null or to a local; what would change the process is refused, or harmless.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        let checks = [
            failed(libc::EAFNOSUPPORT, libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0).into()),
            failed(libc::EPERM, libc::unshare(libc::CLONE_NEWUSER).into()),
            failed(
                libc::EPERM,
                libc::prlimit(1, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit).into(),
            ),
            failed(
                libc::EPERM,
                libc::syscall(libc::SYS_clone, libc::CLONE_NEWUSER | libc::SIGCHLD, 0, 0, 0, 0),
            ),
            failed(libc::ENOSYS, libc::syscall(libc::SYS_clone3, 0, 0)),
            failed(libc::EPERM, libc::syscall(libc::SYS_ioctl, 0, TIOCSTI, 0)),
            failed(libc::EPERM, libc::syscall(libc::SYS_ioctl, 0, TIOCSTI | HIGH, 0)),
            failed(libc::ENOSYS, libc::syscall(4_000)),
            libc::prlimit(0, libc::RLIMIT_NOFILE, std::ptr::null(), &raw mut limit) != 0,
            libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) < 0,
            libc::getpid() <= 1,
            libc::write(1, [].as_ptr(), 0) != 0,
        ];
        checks.iter().position(|failed| *failed).map_or(0, |first| first as i32 + 1)
    }
}

#[test]
fn without_no_new_privs_an_unprivileged_caller_is_refused() {
    let program = Program::compile(PROFILE).unwrap();
    let refused = || {
        // SAFETY: takes integers only; the raw call changes the child's one thread. Root may install anyway.
        unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        program.install().is_err_and(|error| error.raw_os_error() == Some(libc::EACCES))
    };
    assert_eq!(exit_code_of(|| i32::from(!refused())), 0);
}
