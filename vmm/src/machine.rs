//! Puts the devices of a plan on the buses and connects them to the VM.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex};

use boot::layout::{PCI_ECAM, SERIAL_PORT, SLEEP_CONTROL_PORT, VIRTIO_MMIO_SIZE};
use devices::bus::{Bus, Overlap, RestoreError, SaveError, SharedDevice};
use devices::events::EventSink;
use devices::irq::IrqLine;
use devices::pci::{CONFIG_PORT, CONFIG_PORTS, ConfigPorts, ECAM_BUS_LEN, Ecam, PciBus};
use devices::power::{self, AcpiPower, I8042, PowerRequest, PowerSink};
use devices::serial::{self, Serial};
use devices::virtio::VirtioDevice;
use devices::virtio::fs::FsError;
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY};
use devices::virtio::net::vhost::VhostError;
use devices::virtio::pci::{BAR_LEN, NOTIFY, NOTIFY_STRIDE, PciTransport};
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestMemoryMmap};

use crate::config::Tag;
use crate::control::exit::{Exit, ExitRequest};
use crate::control::reset::ResetRequest;
use crate::events::EventHub;
use crate::kvm::vcpu::DeviceBuses;
use crate::kvm::vm::{Vm, VmError};
use crate::plan::{
    Gsi, I8042_PORT, I8042_PORTS, POWER_BUTTON_GSI, Plan, SERIAL_GSI, Transport, VirtioSlot,
};
use crate::share::ShareError;
use crate::tty::output::Output;

/// What went wrong while the machine was put together.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    #[error("the plan of the machine is wrong")]
    Overlap(#[from] Overlap),
    #[error("the plan of the machine has two PCI devices with the number {0}")]
    PciSlot(u8),
    #[error("the plan of the machine has no place for another virtio device")]
    NoSlot,
    #[error("cannot create an eventfd")]
    EventFd(#[from] io::Error),
    #[error("cannot make what a device needs (threads, epoll instances, eventfds)")]
    Device(#[source] io::Error),
    #[error("cannot start to record what passes a NIC")]
    Capture(#[source] io::Error),
    #[error("cannot use vhost-net (load vhost_net, or omit backend=vhost)")]
    Vhost(#[from] VhostError),
    #[error(transparent)]
    FileServer(#[from] ShareError),
    #[error("cannot use the server of the share {0}")]
    Share(Tag, #[source] FsError),
    #[error(transparent)]
    Vm(#[from] VmError),
}

// What the tables have the guest write is what the device understands. Neither crate knows the
// other, so this is where they are held together.
const _: () = assert!(
    boot::layout::S5_SLEEP_TYPE == AcpiPower::SLP_TYP_S5
        && boot::layout::RESET_VALUE == AcpiPower::RESET_VALUE
        && (boot::layout::RESET_PORT - SLEEP_CONTROL_PORT) as u64 == power::RESET
);

/// A machine that is being put together.
#[derive(Debug)]
pub struct Machine<'a> {
    vm: &'a Vm,
    memory: Arc<GuestMemoryMmap>,
    exit: Arc<ExitRequest>,
    reset: Option<ResetRequest>,
    console: Option<Arc<Output>>,
    events: Arc<EventHub>,
    ports: Bus,
    mmio: Bus,
    /// Where the next virtio devices go.
    slots: VecDeque<VirtioSlot>,
    /// What stands on the PCI bus so far, if the machine has one.
    pci: Option<PciBus>,
}

impl<'a> Machine<'a> {
    /// A machine as `plan` has it, that can be powered off, and reset, which ends it too unless it
    /// has a `reset`. Its serial port writes to `console`. What happens to its devices is published
    /// by `events`.
    pub fn new(
        vm: &'a Vm,
        memory: Arc<GuestMemoryMmap>,
        exit: Arc<ExitRequest>,
        reset: Option<ResetRequest>,
        console: Option<Arc<Output>>,
        events: Arc<EventHub>,
        plan: &Plan,
    ) -> Result<Self, MachineError> {
        let mut machine = Self {
            vm,
            memory,
            exit,
            reset,
            console,
            events,
            ports: Bus::default(),
            mmio: Bus::default(),
            slots: plan.virtio().iter().copied().collect(),
            pci: (plan.transport() == Transport::Pci).then(PciBus::default),
        };
        let power = AcpiPower(machine.power_sink());
        machine.add_ports(
            SLEEP_CONTROL_PORT,
            power::PORTS,
            Arc::new(Mutex::new(power)),
        )?;
        let i8042 = I8042(machine.power_sink());
        machine.add_ports(I8042_PORT, I8042_PORTS, Arc::new(Mutex::new(i8042)))?;
        Ok(machine)
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap> {
        &self.memory
    }

    /// Takes the events of the device with this name.
    pub fn event_sink(&self, device: &str) -> EventSink {
        self.events.sink(device)
    }

    /// Adds COM1, if the machine has a console.
    pub fn add_serial(&mut self) -> Result<Option<Arc<Mutex<Serial>>>, MachineError> {
        let Some(console) = &self.console else {
            return Ok(None);
        };
        let output = Box::new(console.port());
        let irq = IrqLine::new()?;
        self.vm.register_irqfd(irq.eventfd(), SERIAL_GSI)?;
        let serial = Arc::new(Mutex::new(Serial::new(irq, output)));
        self.add_ports(SERIAL_PORT, serial::PORTS, serial.clone())?;
        Ok(Some(serial))
    }

    /// Adds a virtio device: gives it a window, interrupts and notifications.
    pub fn add_virtio(&mut self, device: impl VirtioDevice + 'static) -> Result<(), MachineError> {
        let device = Box::new(device);
        match self.slots.pop_front().ok_or(MachineError::NoSlot)? {
            VirtioSlot::Mmio { base, gsi } => self.add_mmio(base.0, gsi, device),
            VirtioSlot::Pci {
                device: number,
                bar,
            } => self.add_pci(number, bar.0, device),
        }
    }

    /// Adds a virtio device that has just been made, if it could be.
    pub fn add_new(
        &mut self,
        device: io::Result<impl VirtioDevice + 'static>,
    ) -> Result<(), MachineError> {
        self.add_virtio(device.map_err(MachineError::Device)?)
    }

    fn add_mmio(
        &mut self,
        base: u64,
        gsi: Gsi,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), MachineError> {
        let irq = IrqLine::new()?;
        self.vm.register_irqfd(irq.eventfd(), gsi)?;
        let transport = MmioTransport::new(device, Arc::clone(&self.memory), irq)?;
        for (index, kick) in (0..).zip(transport.kicks()) {
            self.vm
                .register_ioeventfd(kick, base + QUEUE_NOTIFY, Some(index))?;
        }
        let window = base..base + u64::from(VIRTIO_MMIO_SIZE);
        self.mmio.insert(window, Arc::new(Mutex::new(transport)))?;
        Ok(())
    }

    fn add_pci(
        &mut self,
        number: u8,
        bar: u64,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), MachineError> {
        let vectors = PciTransport::vectors(device.as_ref());
        let lines = (0..vectors).map(|_| IrqLine::new());
        let lines: Vec<_> = lines.collect::<Result<_, _>>()?;
        let routes = self.vm.msi_routes(&lines)?;
        let memory = Arc::clone(&self.memory);
        // The plan puts BARs below 4 GiB.
        let transport = PciTransport::new(device, memory, bar as u32, lines, Box::new(routes))?;
        for (index, kick) in (0..).zip(transport.kicks()) {
            let address = bar + u64::from(NOTIFY) + index * u64::from(NOTIFY_STRIDE);
            self.vm.register_ioeventfd(kick, address, None)?;
        }
        let function = Arc::new(Mutex::new(transport));
        if let Some(bus) = &mut self.pci
            && !bus.insert(number.into(), function.clone())
        {
            return Err(MachineError::PciSlot(number));
        }
        self.mmio.insert(bar..bar + u64::from(BAR_LEN), function)?;
        Ok(())
    }

    /// Adds the power button and returns its line.
    pub fn add_power_button(&mut self) -> Result<IrqLine, MachineError> {
        let line = IrqLine::new()?;
        self.vm.register_irqfd(line.eventfd(), POWER_BUTTON_GSI)?;
        Ok(line)
    }

    /// The finished machine, for the vCPUs: adds what gives the guest the PCI bus.
    pub fn finish(mut self) -> Result<DeviceBuses, MachineError> {
        if let Some(bus) = self.pci.take().map(Arc::new) {
            let ports = ConfigPorts::new(Arc::clone(&bus));
            self.add_ports(CONFIG_PORT, CONFIG_PORTS, Arc::new(Mutex::new(ports)))?;
            let window = PCI_ECAM.0..PCI_ECAM.0 + ECAM_BUS_LEN;
            self.mmio.insert(window, Arc::new(Mutex::new(Ecam(bus))))?;
        }
        Ok(DeviceBuses {
            memory: self.memory,
            ports: self.ports,
            mmio: self.mmio,
            exit: self.exit,
            console: self.console,
        })
    }

    fn add_ports(&mut self, first: u16, count: u64, device: SharedDevice) -> Result<(), Overlap> {
        self.ports
            .insert(u64::from(first)..u64::from(first) + count, device)
    }

    /// Ends or resets the guest as it asks, and distinguishes a panic from a reboot.
    fn power_sink(&self) -> PowerSink {
        let (exit, memory) = (Arc::clone(&self.exit), Arc::clone(&self.memory));
        let (reset, console) = (self.reset.clone(), self.console.clone());
        PowerSink::new(move |request| {
            // While a reader that is slow is still waited for.
            if let Some(console) = &console {
                console.send();
            }
            match (request, &reset) {
                (PowerRequest::PowerOff, _) => exit.request(Exit::PowerOff),
                (PowerRequest::Reset, _) if warm_reboot(&memory) => exit.request(Exit::Panic),
                (PowerRequest::Reset, Some(reset)) => reset.request(),
                (PowerRequest::Reset, None) => exit.request(Exit::Reboot),
            }
        })
    }
}

impl DeviceBuses {
    /// Pauses all devices, once the vCPUs stand still: no thread of theirs, nor vhost-net, touches
    /// guest memory, a tap or an interrupt when this has returned. Nothing is lost: frames wait in
    /// the tap, chains in their rings.
    pub fn pause(&self) {
        self.ports.pause();
        self.mmio.pause();
    }

    /// Has the devices go on, before the vCPUs do.
    pub fn resume(&self) {
        self.ports.resume();
        self.mmio.resume();
    }

    /// Resets all devices, while the vCPUs stand still: when this has returned, none of their threads,
    /// nor vhost-net, touches guest memory or an interrupt.
    pub fn reset(&self) {
        self.ports.reset();
        self.mmio.reset();
    }

    /// The states of all devices, which are paused.
    pub fn save(&self) -> Result<Value, SaveError> {
        Ok(json!({ "ports": self.ports.save()?, "mmio": self.mmio.save()? }))
    }

    /// Finds out whether the devices can become those that were saved. It changes nothing.
    pub fn check(&self, state: &Value) -> Result<(), RestoreError> {
        self.ports.check(&state["ports"])?;
        self.mmio.check(&state["mmio"])
    }

    /// Makes the devices, which have not run or are paused, those that were saved, paused. To be
    /// called once guest memory and KVM's interrupt controllers are as they were.
    pub fn restore(&self, mut state: Value) -> Result<(), RestoreError> {
        let mut bus = |name| state.get_mut(name).map(Value::take).unwrap_or_default();
        self.ports.restore(bus("ports"))?;
        self.mmio.restore(bus("mmio"))
    }
}

/// Whether the guest left the BIOS's mark of a warm reboot, which Linux does for the mode in force
/// (arch/x86/kernel/reboot.c): under `reboot=panic_warm` after a panic and not otherwise.
fn warm_reboot(memory: &GuestMemoryMmap) -> bool {
    const WARM: u16 = 0x1234;
    memory
        .read_obj::<u16>(boot::layout::WARM_REBOOT_FLAG)
        .is_ok_and(|mode| u16::from_le(mode) == WARM)
}
