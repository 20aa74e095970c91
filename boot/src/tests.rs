//! Tests of [`load`] as a whole.

pub(crate) mod images;

use self::images::*;
use std::cell::RefCell;

use super::*;
use proptest::prelude::*;
use std::error::Error as _;
use vm_memory::Bytes;

const CMDLINE: &str = "console=ttyS0 panic=-1";

fn boot(
    memory: &GuestMemoryMmap,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<BootState, Error> {
    boot_at(memory, kernel, initrd, cmdline, [0, 0])
}

fn boot_at(
    memory: &GuestMemoryMmap,
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    random: [u64; 2],
) -> Result<BootState, Error> {
    let mut initrd = initrd.map(file_with);
    load(
        memory,
        &mut BootSpec {
            kernel: &mut file_with(kernel),
            initrd: initrd.as_mut(),
            cmdline,
            random,
            prepare: &|_| (),
            platform: &platform(4, 2),
        },
    )
}

#[test]
fn load_bzimage_puts_everything_in_its_place() {
    let memory = memory(64);
    let state = boot(&memory, &bzimage(), Some(b"070701"), CMDLINE).unwrap();
    assert_eq!(state.protocol, Protocol::Linux64);
    let initrd = state.initrd.unwrap();
    assert_eq!((initrd.start.0, initrd.size), ((64 << 20) - 4096, 6));
    let mut cmdline = [0; CMDLINE.len()];
    memory.read_slice(&mut cmdline, layout::CMDLINE).unwrap();
    assert_eq!(cmdline, CMDLINE.as_bytes());
    let signature: [u8; 8] = memory.read_obj(layout::ACPI_START).unwrap();
    assert_eq!(signature, *b"RSD PTR ");
}

#[test]
fn memory_of_the_kernel_is_prepared_before_it_is_written() {
    for kernel in [bzimage(), elf(true)] {
        let memory = memory(64);
        let prepared = RefCell::new(Vec::new());
        let prepare = |range: Range<u64>| {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            memory
                .read_slice(&mut bytes, GuestAddress(range.start))
                .unwrap();
            assert!(bytes.iter().all(|byte| *byte == 0), "{range:x?}");
            prepared.borrow_mut().push(range);
        };
        let mut spec = BootSpec {
            kernel: &mut file_with(&kernel),
            initrd: None,
            cmdline: CMDLINE,
            random: [0, 0],
            prepare: &prepare,
            platform: &platform(4, 2),
        };
        let state = load(&memory, &mut spec).unwrap();
        let prepared = prepared.into_inner();
        let is_in = |range: &Range<u64>| range.contains(&state.regs.rip);
        assert!(prepared.iter().any(is_in), "{prepared:x?}");
    }
}

#[test]
fn load_pvh_kernel_hands_over_the_start_info() {
    let state = boot(&memory(64), &elf(true), None, CMDLINE).unwrap();
    assert_eq!(state.protocol, Protocol::Pvh);
    assert_eq!(state.regs.rbx, layout::PVH_START_INFO.0);
}

#[test]
fn load_failure_names_the_part_and_the_reason() {
    let error = boot(&memory(64), &bzimage(), Some(&[]), CMDLINE).unwrap_err();
    assert_eq!(error.to_string(), "cannot load the initrd");
    assert!(error.source().unwrap().to_string().contains("empty"));
    let error = boot(&memory(64), &bzimage(), None, &"x".repeat(2048)).unwrap_err();
    assert!(matches!(
        error,
        Error::Cmdline(cmdline::Error::TooLong { .. })
    ));
}

proptest! {
    #[test]
    fn load_any_memory_and_initrd_never_overlaps(
        mib in 1_u64..80,
        initrd_kib in 1_usize..24 << 10,
        image in prop_oneof![
            Just(bzimage()),
            Just(elf(false)),
            Just(elf(true)),
            Just(packed(&gzip(&vmlinux(0x2000, &relocations())))),
        ],
        random in any::<[u64; 2]>(),
    ) {
        let initrd = vec![7; initrd_kib << 10];
        if let Ok(state) = boot_at(&memory(mib), &image, Some(&initrd), CMDLINE, random) {
            let initrd = state.initrd.unwrap();
            let (start, end) = (initrd.start.0, initrd.start.0 + initrd.size);
            prop_assert!(start >= layout::HIGH_RAM_START.0 && end <= mib << 20);
            prop_assert!(end <= state.kernel.start || start >= state.kernel.end);
        }
    }
}
