//! All sessions, in one thread: so a guest whose processes are used up still answers. Each command is started on a thread of
//! its own, if there can be one: that waits until the program is executed, which may be on a file system that does not answer.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::mem;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use agent_protocol::Inbox;
use agent_protocol::session::{Exec, FromCommand, Request, SessionId, Stream};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::connection::{Connection, Heard, PATIENCE};
use super::copy::{Copies, Copy};
use super::running::{Opened, Running, Session};
use super::start::{self, StartError, Started};
use super::unpack;
use crate::chain;
use crate::children::{Children, Ended};
use crate::listener::Listener;

/// The most descriptors of sessions: a process has 1,024 by default.
const MOST: usize = 800;
/// Those of a command: its connections, and the other ends of its streams.
const OF_COMMAND: usize = 7;
/// How long to wait for descriptors or memory before the next connection is accepted.
const PAUSE: Duration = Duration::from_millis(20);

/// Serves the host.
///
/// # Errors
///
/// Those of accept(2) and poll(2) that do not end by themselves, and of making a socket.
pub fn serve(listener: &Listener, children: &Arc<Children>) -> io::Result<Infallible> {
    listener.set_nonblocking()?;
    let mut server = Server::new(children)?;
    loop {
        server.turn(listener)?;
    }
}

/// A command whose streams are not there yet.
#[derive(Debug)]
struct Waiting {
    exec: Box<Exec>,
    control: UnixStream,
    inbox: Inbox,
    deadline: Instant,
}

/// A stream whose command is not there, or waits for another one.
#[derive(Debug)]
struct Parked {
    session: SessionId,
    opened: Opened,
    deadline: Instant,
}

/// A command that is being started.
#[derive(Debug)]
struct Starting {
    session: Session,
    /// It has ended before that was known.
    ended: Option<Ended>,
}

/// What has become of a command.
#[derive(Debug)]
enum News {
    Started(Result<Started, StartError>),
    Ended(Ended),
}

/// The way of news to the server.
#[derive(Clone, Debug)]
struct Reporter {
    number: u64,
    news: Sender<(u64, News)>,
    waker: Arc<UnixStream>,
}

impl Reporter {
    fn report(&self, news: News) {
        // Both fail when the server has ended, or has enough to wake it.
        let _ = self.news.send((self.number, news));
        let _ = (&*self.waker).write(&[0]);
    }
}

#[derive(Debug)]
struct Server {
    children: Arc<Children>,
    connections: Vec<Connection>,
    waiting: Vec<Waiting>,
    parked: Vec<Parked>,
    starting: BTreeMap<u64, Starting>,
    running: BTreeMap<u64, Running>,
    /// The number of the next command.
    next: u64,
    /// What has become of commands, after a byte on the socket.
    heard: Receiver<(u64, News)>,
    news: Sender<(u64, News)>,
    woken: UnixStream,
    waker: Arc<UnixStream>,
    copies: Copies,
    /// No connection is accepted before.
    accepts: Instant,
}

impl Server {
    fn new(children: &Arc<Children>) -> io::Result<Self> {
        let (news, heard) = mpsc::channel();
        let (woken, waker) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        Ok(Self {
            children: children.clone(),
            connections: Vec::new(),
            waiting: Vec::new(),
            parked: Vec::new(),
            starting: BTreeMap::new(),
            running: BTreeMap::new(),
            next: 0,
            heard,
            news,
            woken,
            waker: Arc::new(waker),
            copies: Copies::default(),
            accepts: Instant::now(),
        })
    }

    /// Waits until there is something to do, and does it.
    fn turn(&mut self, listener: &Listener) -> io::Result<()> {
        let accepts = Instant::now() >= self.accepts;
        let mut list = vec![PollFd::new(&self.woken, PollFlags::IN)];
        if accepts {
            list.push(PollFd::new(listener, PollFlags::IN));
        }
        let streams = self.connections.iter().map(Connection::stream);
        list.extend(streams.map(|stream| PollFd::new(stream, PollFlags::IN)));
        for running in self.running.values() {
            running.watch(&mut list);
        }
        match poll(&mut list, self.timeout(accepts).as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<_> = list.iter().map(PollFd::revents).collect();
        let mut ready = ready.into_iter();
        let mut is_ready = || ready.next().is_some_and(|flags| !flags.is_empty());
        let is_woken = is_ready();
        let has_connection = accepts && is_ready();
        let heard: Vec<_> = self.connections.iter().map(|_| is_ready()).collect();
        for running in self.running.values_mut() {
            running.turn(&mut ready);
        }
        if is_woken {
            self.take_news();
        }
        self.listen(&heard);
        self.start();
        if has_connection {
            self.accept(listener)?;
        }
        self.expire();
        Ok(())
    }

    /// Until the first deadline.
    fn timeout(&self, accepts: bool) -> Option<Timespec> {
        let deadlines = self.connections.iter().map(|it| it.deadline);
        let deadlines = deadlines
            .chain(self.waiting.iter().map(|it| it.deadline))
            .chain(self.parked.iter().map(|it| it.deadline))
            .chain(self.running.values().filter_map(Running::deadline))
            .chain((!accepts).then_some(self.accepts));
        let left = deadlines.min()?.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    /// Takes the commands that have been started, and those that have ended.
    fn take_news(&mut self) {
        let _ = (&self.woken).read(&mut [0; 64]);
        while let Ok((number, news)) = self.heard.try_recv() {
            match news {
                News::Started(started) => self.started(number, started),
                News::Ended(ended) => {
                    if let Some(running) = self.running.get_mut(&number) {
                        running.ended(ended);
                    } else if let Some(starting) = self.starting.get_mut(&number) {
                        starting.ended = Some(ended);
                    }
                }
            }
        }
    }

    fn started(&mut self, number: u64, started: Result<Started, StartError>) {
        let Some(Starting { session, ended }) = self.starting.remove(&number) else {
            return;
        };
        match started {
            Ok(started) => {
                let mut running = Running::new(started, session);
                if let Some(ended) = ended {
                    running.ended(ended);
                }
                self.running.insert(number, running);
            }
            Err(error) => refuse(&session.control, &error),
        }
    }

    /// Accepts what waits, as far as there is room.
    fn accept(&mut self, listener: &Listener) -> io::Result<()> {
        loop {
            let stream = match listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => return Ok(()),
                Err(error) => match Errno::from_io_error(&error) {
                    Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                        self.accepts = Instant::now() + PAUSE;
                        return Ok(());
                    }
                    _ => return Err(error),
                },
            };
            // The host sees that it is closed.
            if self.descriptors() + OF_COMMAND > MOST {
                continue;
            }
            // One that has gone already is none.
            let connection = Connection::new(stream, listener.has_line());
            self.connections.extend(connection.ok());
        }
    }

    fn descriptors(&self) -> usize {
        let running = self.running.values().map(Running::descriptors);
        let of_commands = OF_COMMAND * self.starting.len() + running.sum::<usize>();
        self.connections.len() + self.waiting.len() + self.parked.len() + of_commands
    }

    /// Takes what has come on new connections.
    fn listen(&mut self, heard: &[bool]) {
        let connections = mem::take(&mut self.connections);
        for (connection, has_news) in connections.into_iter().zip(heard) {
            match has_news {
                false => self.connections.push(connection),
                true => match connection.listen() {
                    Heard::Nothing(connection) => self.connections.push(connection),
                    Heard::Closed => {}
                    Heard::Request(request, stream, inbox) => self.answer(request, stream, inbox),
                },
            }
        }
    }

    fn answer(&mut self, request: Request, stream: UnixStream, inbox: Inbox) {
        let deadline = Instant::now() + PATIENCE;
        match request {
            Request::Exec(exec) => self.waiting.push(Waiting {
                exec,
                control: stream,
                inbox,
                deadline,
            }),
            Request::UnpackRoot { path } => unpack::serve(path, inbox.into_rest(), stream),
            Request::Stream {
                session,
                stream: which,
            } => self.parked.push(Parked {
                session,
                opened: Opened {
                    stream: which,
                    connection: stream,
                    first: inbox.into_rest(),
                },
                deadline,
            }),
            Request::Pack {
                path,
                directory,
                follows,
            } => {
                let copy = Copy::Pack {
                    path,
                    directory,
                    follows,
                };
                self.copies.start(copy, stream, inbox.into_rest());
            }
            Request::Unpack { path, contents } => {
                let copy = Copy::Unpack { path, contents };
                self.copies.start(copy, stream, inbox.into_rest());
            }
        }
    }

    /// Starts the commands whose streams are there.
    fn start(&mut self) {
        let (ready, waiting): (Vec<_>, Vec<_>) = mem::take(&mut self.waiting)
            .into_iter()
            .partition(|waiting| self.has_streams(waiting));
        self.waiting = waiting;
        for Waiting {
            exec,
            control,
            inbox,
            ..
        } in ready
        {
            let (own, others): (Vec<_>, Vec<_>) = mem::take(&mut self.parked)
                .into_iter()
                .partition(|parked| parked.session == exec.session);
            self.parked = others;
            let streams = own.into_iter().map(|parked| parked.opened).collect();
            let session = Session {
                control,
                inbox,
                streams,
            };
            self.start_one(exec, session);
        }
    }

    fn start_one(&mut self, exec: Box<Exec>, session: Session) {
        let reporter = Reporter {
            number: self.next,
            news: self.news.clone(),
            waker: self.waker.clone(),
        };
        self.next += 1;
        let ended = None;
        self.starting
            .insert(reporter.number, Starting { session, ended });
        let children = self.children.clone();
        let exec = Arc::<Exec>::from(exec);
        let start = move || {
            let ends = reporter.clone();
            let ended = move |how| ends.report(News::Ended(how));
            reporter.report(News::Started(start::start(&exec, &children, ended)));
        };
        if thread::Builder::new().spawn(start.clone()).is_err() {
            start();
        }
    }

    fn has_streams(&self, waiting: &Waiting) -> bool {
        let wanted = match waiting.exec.terminal {
            Some(_) => &[Stream::Terminal][..],
            None => &[Stream::Stdin, Stream::Stdout, Stream::Stderr],
        };
        let session = waiting.exec.session;
        let opened = self.parked.iter().filter(|it| it.session == session);
        let mut opened: Vec<_> = opened.map(|it| it.opened.stream).collect();
        opened.sort();
        opened == wanted
    }

    /// Closes what has waited for too long, and removes what is over.
    fn expire(&mut self) {
        let now = Instant::now();
        self.connections.retain(|it| now < it.deadline);
        self.waiting.retain(|it| now < it.deadline);
        self.parked.retain(|it| now < it.deadline);
        for running in self.running.values_mut() {
            if running.deadline().is_some_and(|deadline| now >= deadline) {
                running.late();
            }
        }
        self.running.retain(|_, running| !running.is_over());
    }
}

fn refuse(control: &UnixStream, error: &StartError) {
    let text = chain(error);
    let reason = error.reason();
    // A host that has gone does not miss it.
    let _ = agent_protocol::write(control, &FromCommand::Failed { reason, text });
}
