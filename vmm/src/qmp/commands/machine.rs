//! What the guest is made of, but for its devices.

use serde::Serialize;

use super::{Command, NoArguments};

pub(super) const COMMANDS: &[Command] = &[
    Command {
        name: "query-name",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                let name = control.name.as_ref().map(ToString::to_string);
                Ok(Name { name })
            });
        },
    },
    Command {
        name: "query-cpus-fast",
        run: |control, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                let threads = control.vcpu_threads().into_iter();
                let cpus = (0..).zip(threads);
                Ok(cpus
                    .map(|(index, thread)| Cpu::new(index, thread))
                    .collect::<Vec<_>>())
            });
        },
    },
    Command {
        name: "query-kvm",
        run: |_, arguments, reply| {
            arguments.answer(reply, |NoArguments {}| {
                Ok(Kvm {
                    enabled: true,
                    present: true,
                })
            });
        },
    },
];

/// NameInfo of QEMU.
#[derive(Debug, Serialize)]
struct Name {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
}

/// CpuInfoFast of QEMU.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Cpu {
    cpu_index: usize,
    qom_path: String,
    thread_id: i32,
    props: CpuProperties,
    target: &'static str,
}

/// CpuInstanceProperties of QEMU.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct CpuProperties {
    socket_id: usize,
    core_id: usize,
    thread_id: usize,
}

impl Cpu {
    fn new(index: usize, thread_id: i32) -> Self {
        Self {
            cpu_index: index,
            qom_path: format!("/machine/unattached/device[{index}]"),
            thread_id,
            props: CpuProperties {
                socket_id: 0,
                core_id: index,
                thread_id: 0,
            },
            target: "x86_64",
        }
    }
}

/// KvmInfo of QEMU.
#[derive(Debug, Serialize)]
struct Kvm {
    enabled: bool,
    present: bool,
}
