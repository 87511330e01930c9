//! Every option of the command line that is a number, found by introspection: what extremes it takes, for a test that runs them.

use std::any::TypeId;

use clap::error::ErrorKind;
use clap::{Arg, Command as Clap, CommandFactory};

use crate::args::Cli;

/// A numeric option.
pub struct Number {
    /// The command it belongs to.
    pub command: String,
    /// The option, without its dashes.
    pub option: String,
    /// The least and the most of the values tried that it takes.
    pub extremes: [String; 2],
}

/// Values in rising order, from what no option takes to what none takes.
const VALUES: [&str; 28] = [
    "-1e300",
    "-10000",
    "-1",
    "0",
    "1e-300",
    "1e-30",
    "0.5",
    "0.99",
    "1",
    "2",
    "4",
    "8",
    "100",
    "255",
    "1000",
    "4096",
    "10000",
    "65536",
    "100000",
    "1000000",
    "1048576",
    "16777216",
    "1073741824",
    "4294967295",
    "1000000000000",
    "9000000000000000000",
    "18446744073709551615",
    "1e300",
];

/// All numeric options, the global ones once.
pub fn numbers() -> Vec<Number> {
    let mut cli = Cli::command();
    cli.build();
    let mut found: Vec<Number> = Vec::new();
    for command in cli.get_subcommands() {
        for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values() && is_number(arg).is_some()) {
            let Some(option) = arg.get_long() else { continue };
            if arg.is_global_set() && found.iter().any(|number| number.option == option) {
                continue;
            }
            let taken: Vec<&str> = VALUES.into_iter().filter(|value| takes(arg, value)).collect();
            if let [first, .., last] = taken.as_slice() {
                let extremes = [(*first).to_owned(), (*last).to_owned()];
                found.push(Number { command: command.get_name().to_owned(), option: option.to_owned(), extremes });
            }
        }
    }
    found
}

/// Whether an option's value is a number, and of which kind: whole or not.
pub(crate) fn is_number(arg: &Arg) -> Option<bool> {
    let id = arg.get_value_parser().type_id();
    let is = |ids: &[TypeId]| ids.iter().any(|known| id == *known);
    let whole = [TypeId::of::<u8>(), TypeId::of::<u16>(), TypeId::of::<u32>(), TypeId::of::<u64>()];
    let more = [TypeId::of::<usize>(), TypeId::of::<i32>(), TypeId::of::<i64>(), TypeId::of::<isize>()];
    match () {
        () if is(&whole) || is(&more) => Some(true),
        () if is(&[TypeId::of::<f32>(), TypeId::of::<f64>()]) => Some(false),
        () => None,
    }
}

/// What an option's own parser says to a value: the option alone is given, so that no other one matters.
pub(crate) fn takes(arg: &Arg, value: &str) -> bool {
    let option = format!("--{}={value}", arg.get_long().unwrap_or_default());
    let command = Clap::new("one").no_binary_name(true).disable_help_flag(true).arg(arg.clone());
    match command.try_get_matches_from([option]) {
        Err(e) => !matches!(e.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue),
        Ok(_) => true,
    }
}
