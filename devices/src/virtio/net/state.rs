//! What a network device needs to go on elsewhere.

use std::io;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::backend::{Backend, HEADER_LEN};
use super::config::ConfigState;
use super::ctrl;
use super::device::{LARGEST_FRAME, Net};
use super::filter::Rules;
use super::hooks::Hooks;
use crate::bus::BoxError;
use crate::virtio::rate::Levels;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    config: ConfigState,
    rules: Rules,
    /// Of each pair, the frame that was received and waits for buffers.
    frames: Vec<Option<Vec<u8>>>,
    rx_limit: Option<Levels>,
    tx_limit: Option<Levels>,
}

impl<B: Backend> Net<B> {
    pub(super) fn save_state(&self) -> Value {
        let levels = |hooks: &Hooks| hooks.limiter.as_ref().map(|limiter| limiter.save());
        json!(State {
            config: self.config.save(),
            rules: self.filter.change(|rules| rules.clone()),
            frames: self.frames.clone(),
            rx_limit: levels(&self.rx_hooks),
            tx_limit: levels(&self.tx_hooks),
        })
    }

    /// What was saved, if this device can go on with it.
    pub(super) fn saved_state(&self, state: &Value) -> Result<State, BoxError> {
        let state = State::deserialize(state)?;
        let fits = |frame: &Vec<u8>| (HEADER_LEN..=LARGEST_FRAME).contains(&frame.len());
        if state.frames.len() != self.frames.len() || !state.frames.iter().flatten().all(fits) {
            return Err("its queue pairs are others".into());
        }
        Ok(state)
    }

    /// # Errors
    ///
    /// Fails when the host has not the offloads or refuses the MAC address.
    pub(super) fn restore_state(&mut self, state: State) -> io::Result<()> {
        self.set_offloads(state.rules.offloads)?;
        ctrl::use_pairs(&self.backends, state.rules.pairs.into());
        self.config.restore(&state.config, &*self.backends[0])?;
        self.filter.change(|rules| *rules = state.rules);
        self.frames = state.frames;
        for (hooks, levels) in [
            (&self.rx_hooks, state.rx_limit),
            (&self.tx_hooks, state.tx_limit),
        ] {
            if let (Some(limiter), Some(levels)) = (&hooks.limiter, levels) {
                limiter.restore(levels);
            }
        }
        Ok(())
    }
}
