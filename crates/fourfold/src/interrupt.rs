//! Ctrl-C. A command that has something to wind up asks [`requested`] between steps; any other is ended at once. A second
//! Ctrl-C always ends the program.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::output;

/// The shell's convention: 128 + SIGINT.
pub const EXIT_CODE: u8 = 130;

static COUNT: AtomicUsize = AtomicUsize::new(0);
static COOPERATIVE: AtomicBool = AtomicBool::new(false);
/// What is said when the first Ctrl-C is heard; nothing where it is empty.
static ANSWER: Mutex<&str> = Mutex::new("");

/// Sets the handler. Where that fails, Ctrl-C keeps its usual effect.
pub fn install() {
    let _ = ctrlc::set_handler(|| {
        let earlier = COUNT.fetch_add(1, Ordering::SeqCst);
        if earlier > 0 || !COOPERATIVE.load(Ordering::SeqCst) {
            fourfold_disk::remove_unfinished();
            std::process::exit(i32::from(EXIT_CODE));
        }
        let answer = ANSWER.lock().map_or("", |answer| *answer);
        if !answer.is_empty() {
            output::note(answer);
        }
    });
}

/// From now on the command asks [`requested`] itself.
pub fn cooperate() -> Cooperation {
    COOPERATIVE.store(true, Ordering::SeqCst);
    Cooperation
}

/// As [`cooperate`], and says `answer` when the first Ctrl-C is heard.
pub fn cooperate_saying(answer: &'static str) -> Cooperation {
    if let Ok(mut said) = ANSWER.lock() {
        *said = answer;
    }
    cooperate()
}

/// While this lives, one Ctrl-C does not end the program.
#[must_use]
pub struct Cooperation;

impl Drop for Cooperation {
    fn drop(&mut self) {
        COOPERATIVE.store(false, Ordering::SeqCst);
        if let Ok(mut said) = ANSWER.lock() {
            *said = "";
        }
    }
}

/// Whether Ctrl-C was pressed.
pub fn requested() -> bool {
    COUNT.load(Ordering::SeqCst) > 0
}

/// Forgets a Ctrl-C that has been answered.
pub fn clear() {
    COUNT.store(0, Ordering::SeqCst);
}
