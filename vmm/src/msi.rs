//! Interrupt messages (MSI): which eventfd sends which, by KVM's routing table.

use std::sync::{Arc, Mutex, PoisonError};

use devices::pci::MsixRoutes;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KvmIrqRouting,
    kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::plan::GSIS;

/// KVM's routing table: from each interrupt's number (GSI) to an input of the I/O APIC, or to a
/// message. It can only be set as a whole.
#[derive(Debug)]
pub struct Routes {
    fd: Arc<VmFd>,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    /// The message of each GSI from [`GSIS`] on, where it has one.
    messages: Vec<Option<Message>>,
}

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
            table: Mutex::new(Table {
                messages: Vec::new(),
            }),
        }
    }

    /// Numbers for the messages of one function.
    pub fn messages(self: &Arc<Self>, lines: Vec<EventFd>) -> Messages {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let first = table.messages.len();
        table.messages.resize(first + lines.len(), None);
        let connected = Mutex::new(vec![false; lines.len()]);
        Messages {
            routes: Arc::clone(self),
            first,
            lines,
            connected,
        }
    }

    fn set(&self, index: usize, message: Message) -> Result<(), kvm_ioctls::Error> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let before = table.messages[index].replace(message);
        let inputs = (0..GSIS).map(input);
        let messages = table
            .messages
            .iter()
            .enumerate()
            .filter_map(|(index, message)| message.map(|message| message.route(gsi(index))));
        let entries: Vec<_> = inputs.chain(messages).collect();
        // More entries than the table may have are refused like everything else that is wrong.
        let result = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOSPC))
            .and_then(|routing| self.fd.set_gsi_routing(&routing));
        if result.is_err() {
            // Or the next message, of whichever vector, would be refused with it.
            table.messages[index] = before;
        }
        result
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
    fn route(self, gsi: u32) -> kvm_irq_routing_entry {
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

/// The messages of one function.
#[derive(Debug)]
pub struct Messages {
    routes: Arc<Routes>,
    /// Its first one in the table.
    first: usize,
    lines: Vec<EventFd>,
    connected: Mutex<Vec<bool>>,
}

impl MsixRoutes for Messages {
    fn connect(&self, vector: usize, address: u64, data: u32) {
        let index = self.first + vector;
        if let Err(error) = self.routes.set(index, Message { address, data }) {
            // A guest may write any address: it is its own interrupt that will not come.
            return log::debug!("KVM refuses the message {data:#x} to {address:#x}: {error}");
        }
        let mut connected = self
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
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
        let mut connected = self
            .connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut connected[vector]) {
            let gsi = gsi(self.first + vector);
            if let Err(error) = self.routes.fd.unregister_irqfd(&self.lines[vector], gsi) {
                log::debug!("KVM does not let go of interrupt {gsi}: {error}");
            }
        }
    }
}
