//! A belt around other people's code: a panic in it becomes an error of its input.
//!
//! What is known to make a library panic is refused before the library sees it. This is for what is not known.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Calls a library. A panic of it is an error with its message; what the call has changed by then must not be used any more.
///
/// # Errors
/// The library panicked: the text says of what library, and how.
pub fn guarded<T>(library: &str, call: impl FnOnce() -> T) -> Result<T, String> {
    let outer = INSIDE.replace(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    INSIDE.set(outer);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        format!("the library {library} does not take it and fails inside: {}", text.unwrap_or("no message"))
    })
}

/// Whether this thread is in such a call: a panic is then an error on its way, and no mistake of the program.
pub fn is_guarded() -> bool {
    INSIDE.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_with_its_message() {
        assert_eq!(guarded("x", || 3), Ok(3));
        let error = guarded("x", || {
            assert!(is_guarded());
            panic!("a value");
        });
        assert!(matches!(error, Err::<(), _>(text) if text.ends_with("a value")));
        assert!(!is_guarded());
    }
}
