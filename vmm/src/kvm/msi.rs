//! MSI vectors: which eventfd sends which, by KVM's routing table.

use std::sync::{Arc, Mutex};

use devices::pci::MsixRoutes;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use super::lock;
use crate::plan::GSIS;

/// KVM's routing table: from each interrupt's number (GSI) to an input of the I/O APIC, or to a
/// message. It can only be set as a whole.
#[derive(Debug)]
pub struct Routes {
    fd: Arc<VmFd>,
    table: Mutex<Table>,
}

/// The message of each GSI from [`GSIS`] on, where it has one.
#[derive(Debug, Default)]
struct Table(Vec<Option<Message>>);

/// Where a message goes and what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Message {
    address: u64,
    data: u32,
}

impl Routes {
    /// The table as KVM has it for a new VM, without any message.
    pub fn new(fd: Arc<VmFd>) -> Self {
        Self {
            fd,
            table: Mutex::default(),
        }
    }

    /// GSIs for the vectors of one function.
    pub fn for_vectors(self: &Arc<Self>, lines: Vec<EventFd>) -> MsiRoutes {
        let mut table = lock(&self.table);
        let first = table.0.len();
        table.0.resize(first + lines.len(), None);
        let connected = Mutex::new(vec![false; lines.len()]);
        MsiRoutes {
            routes: Arc::clone(self),
            first,
            lines,
            connected,
        }
    }

    fn set(&self, index: usize, message: Message) -> Result<(), kvm_ioctls::Error> {
        let mut table = lock(&self.table);
        table.set(index, message, |entries| {
            // More entries than the table may have are refused like everything else that is wrong.
            let routing = KvmIrqRouting::from_entries(entries)
                .map_err(|_| kvm_ioctls::Error::new(libc::ENOSPC))?;
            self.fd.set_gsi_routing(&routing)
        })
    }
}

impl Table {
    /// Gives a GSI its message, and `submit`s the whole table if that is a new one: guests mask and
    /// unmask far more often than they change a message, and KVM waits for all its readers of the
    /// table to let go of the old one.
    fn set(
        &mut self,
        index: usize,
        message: Message,
        submit: impl FnOnce(&[kvm_irq_routing_entry]) -> Result<(), kvm_ioctls::Error>,
    ) -> Result<(), kvm_ioctls::Error> {
        if self.0[index] == Some(message) {
            return Ok(());
        }
        let before = self.0[index].replace(message);
        let result = submit(&self.entries());
        if result.is_err() {
            // Or the next message, of whichever vector, would be refused with it.
            self.0[index] = before;
        }
        result
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let messages = self.0.iter().enumerate();
        let routes =
            messages.filter_map(|(index, message)| Some(message.as_ref()?.route(gsi(index))));
        (0..GSIS).map(input).chain(routes).collect()
    }
}

fn gsi(index: usize) -> u32 {
    GSIS + index as u32
}

/// An input of the I/O APIC, with the number that it has in ACPI too. The 8259s have none: the
/// tables say that there are none.
fn input(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
    entry.u.irqchip.pin = gsi;
    entry
}

impl Message {
    fn route(&self, gsi: u32) -> kvm_irq_routing_entry {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        entry.u.msi.address_lo = self.address as u32;
        entry.u.msi.address_hi = (self.address >> 32) as u32;
        entry.u.msi.data = self.data;
        entry
    }
}

/// The MSI vectors of one function, each with its GSI.
#[derive(Debug)]
pub struct MsiRoutes {
    routes: Arc<Routes>,
    /// Its first one in the table.
    first: usize,
    lines: Vec<EventFd>,
    connected: Mutex<Vec<bool>>,
}

impl MsixRoutes for MsiRoutes {
    fn connect(&self, vector: usize, address: u64, data: u32) {
        let index = self.first + vector;
        if let Err(error) = self.routes.set(index, Message { address, data }) {
            // A guest may write any address: it is its own interrupt that will not come.
            return log::debug!("KVM refuses the message {data:#x} to {address:#x}: {error}");
        }
        let mut connected = lock(&self.connected);
        if !connected[vector] {
            match self
                .routes
                .fd
                .register_irqfd(&self.lines[vector], gsi(index))
            {
                Ok(()) => connected[vector] = true,
                Err(error) => log::debug!("KVM refuses the interrupt {}: {error}", gsi(index)),
            }
        }
    }

    fn disconnect(&self, vector: usize) {
        let mut connected = lock(&self.connected);
        if std::mem::take(&mut connected[vector]) {
            let gsi = gsi(self.first + vector);
            if let Err(error) = self.routes.fd.unregister_irqfd(&self.lines[vector], gsi) {
                log::debug!("KVM does not let go of interrupt {gsi}: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MESSAGE: Message = Message {
        address: 0xfee0_0000,
        data: 0x41,
    };

    /// Sets a message; returns the table's length if it was submitted.
    fn set(table: &mut Table, index: usize, message: Message) -> Option<usize> {
        let mut submitted = None;
        let submit = |entries: &[kvm_irq_routing_entry]| {
            submitted = Some(entries.len());
            Ok(())
        };
        table.set(index, message, submit).unwrap();
        submitted
    }

    #[test]
    fn table_is_submitted_only_where_a_message_changes() {
        let mut table = Table(vec![None; 2]);
        let inputs = GSIS as usize;
        assert_eq!(set(&mut table, 1, MESSAGE), Some(inputs + 1));
        assert_eq!(set(&mut table, 1, MESSAGE), None);
        assert_eq!(set(&mut table, 0, MESSAGE), Some(inputs + 2));
        let other = Message {
            data: 0x42,
            ..MESSAGE
        };
        assert_eq!(set(&mut table, 1, other), Some(inputs + 2));
        assert_eq!(set(&mut table, 1, MESSAGE), Some(inputs + 2));
    }

    #[test]
    fn message_that_is_refused_is_submitted_again() {
        let mut table = Table(vec![None]);
        let refused = table.set(0, MESSAGE, |_| Err(kvm_ioctls::Error::new(libc::EINVAL)));
        assert!(refused.is_err());
        assert_eq!(set(&mut table, 0, MESSAGE), Some(GSIS as usize + 1));
    }
}
