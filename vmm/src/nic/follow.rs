//! What the control thread does for a NIC while the guest runs: the guest's link follows the host's, frames that only the
//! kernel moves tell of the guest, and what is known of it is published.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::net::config::ConfigSpace;
use devices::virtio::net::observe::Observer;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use net::{FrameListener, HEARD_LEN, MacAddr};
use vmm_sys_util::timerfd::TimerFd;

use super::link::Link;
use super::registry::Claim;
use crate::events::{Event, EventHub};

/// How long news waits to be published: a guest can cause any amount of it.
const PUBLISH_DELAY: Duration = Duration::from_millis(100);
/// How often in that time new addresses are announced at once; any more wait for its end.
const MOST_AT_ONCE: u32 = 4;
/// Frames that are looked at before a pause: a guest can send any number.
const FRAME_BUDGET: usize = 64;
const FRAME_PAUSE: Duration = Duration::from_millis(100);

// Event tokens.
const LEARNT: u32 = 0;
const PUBLISH: u32 = 1;
const FRAME: u32 = 2;
const PAUSE_OVER: u32 = 3;
const LINK: u32 = 4;
const ANNOUNCE: u32 = 5;
const UPKEEP: u32 = 6;

/// A NIC, and all that there may be news of.
#[derive(Debug)]
pub struct Follower {
    /// The NIC, in logs.
    name: String,
    /// Has the NIC's MAC address, MTU and link state.
    guest: Arc<ConfigSpace>,
    observer: Arc<Observer>,
    /// A macvtap's.
    claim: Option<Claim>,
    /// The name of the NIC in events.
    id: String,
    events: Arc<EventHub>,
    /// The addresses that were announced last.
    announced: Vec<IpAddr>,
    /// How often they were since the last publication.
    at_once: u32,
    /// Runs while there is something that is not published yet.
    publish: TimerFd,
    link: Option<Link>,
    /// The timer runs during a pause.
    listener: Option<(FrameListener, TimerFd)>,
}

impl Follower {
    /// Publishes by `claim` what `observer`, `listener` and `link` say of `guest`.
    ///
    /// # Errors
    ///
    /// Fails with EMFILE.
    pub fn new(
        name: String,
        guest: Arc<ConfigSpace>,
        observer: Arc<Observer>,
        claim: Option<Claim>,
        link: Option<Link>,
        listener: Option<FrameListener>,
    ) -> io::Result<Self> {
        let with_timer = |listener| Ok::<_, io::Error>((listener, TimerFd::new()?));
        let mut follower = Self {
            name,
            guest,
            observer,
            claim,
            id: String::new(),
            events: Arc::default(),
            announced: Vec::new(),
            at_once: 0,
            publish: TimerFd::new()?,
            link,
            listener: listener.map(with_timer).transpose()?,
        };
        // By the control thread, which the guest does not wait for.
        follower.publish.reset(Duration::from_nanos(1), None)?;
        Ok(follower)
    }

    /// Has new addresses of the NIC, which is called `id` there, announced by `events`.
    pub fn announce_to(&mut self, id: String, events: Arc<EventHub>) {
        self.id = id;
        self.events = events;
    }

    fn announce(&mut self) {
        let addresses = self.observer.addresses();
        let mac = MacAddr::try_from(self.guest.mac()).ok();
        for address in addresses.iter().filter(|new| !self.announced.contains(new)) {
            self.events.publish(Event::Address {
                nic: self.id.clone(),
                mac,
                address: *address,
            });
        }
        self.announced = addresses;
    }

    fn publish(&mut self) {
        self.announce();
        self.at_once = 0;
        let Some(claim) = &mut self.claim else { return };
        claim.update(|nic| {
            nic.addresses.clone_from(&self.announced);
            nic.wrong_source_frames = self.observer.wrong_source();
            nic.tap.mtu = self.guest.mtu().into();
            nic.link = self.link.as_ref().map(Link::seen);
        });
    }

    fn publish_later(&mut self) {
        if !self.publish.is_armed().unwrap_or(false) {
            let _ = self.publish.reset(PUBLISH_DELAY, None);
        }
    }
}

/// Looks at the frames that have come, and returns whether there may be more.
fn look_at_frames(listener: &FrameListener, observer: &Observer) -> bool {
    let mut buffer = [0; HEARD_LEN];
    for _ in 0..FRAME_BUDGET {
        match listener.next(&mut buffer) {
            Ok(Some(frame)) => observer.see(frame),
            Ok(None) => return false,
            // The link is down or gone, as its watch shows; there may be more later.
            Err(error) => {
                log::debug!("cannot read the guest's frames: {error}");
                return true;
            }
        }
    }
    true
}

impl MutEventSubscriber for Follower {
    fn init(&mut self, ops: &mut EventOps) {
        let mut all = vec![
            (self.observer.changed().as_raw_fd(), LEARNT),
            (self.publish.as_raw_fd(), PUBLISH),
        ];
        if let Some((listener, pause)) = &self.listener {
            all.push((listener.as_fd().as_raw_fd(), FRAME));
            all.push((pause.as_raw_fd(), PAUSE_OVER));
        }
        if let Some(link) = &self.link {
            all.push((link.watch.as_fd().as_raw_fd(), LINK));
            all.push((link.announce.as_raw_fd(), ANNOUNCE));
            all.push((link.upkeep.as_raw_fd(), UPKEEP));
        }
        for (fd, token) in all {
            if let Err(error) = ops.add(Events::with_data_raw(fd, token, EventSet::IN)) {
                log::warn!("{}: cannot follow the NIC: {error}", self.name);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match (events.data(), &mut self.listener, &mut self.link) {
            (LEARNT, _, _) => {
                let _ = self.observer.changed().read();
                if self.at_once < MOST_AT_ONCE {
                    self.at_once += 1;
                    self.announce();
                }
                self.publish_later();
            }
            (PUBLISH, _, _) => {
                // Reading it would block if it was set again meanwhile.
                let _ = self.publish.clear();
                self.publish();
            }
            (FRAME, Some((listener, pause)), _) if look_at_frames(listener, &self.observer) => {
                let _ = ops.remove(events);
                let _ = pause.reset(FRAME_PAUSE, None);
            }
            (PAUSE_OVER, Some((listener, pause)), _) => {
                let _ = pause.wait();
                let fd = listener.as_fd().as_raw_fd();
                if let Err(error) = ops.add(Events::with_data_raw(fd, FRAME, EventSet::IN)) {
                    log::warn!("{}: cannot follow its frames: {error}", self.name);
                }
            }
            (LINK, _, Some(link)) => {
                if let Err(error) = link.follow() {
                    log::warn!("{}: its link is no longer watched: {error}", self.name);
                    let _ = ops.remove(events);
                }
                self.publish_later();
            }
            (ANNOUNCE, _, Some(link)) => link.announce(),
            (UPKEEP, _, Some(link)) => {
                link.keep_up();
                self.publish_later();
            }
            _ => {}
        }
    }
}
