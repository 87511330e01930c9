//! `trainer_state.json`: what a person can read, and beside it the bits of its numbers, since decimal digits on their way through JSON may lose the
//! last one.

use serde_json::{Error, Value, json};

use super::State;

/// The member that holds bits, in hexadecimal.
const BITS: &str = "bits";

/// The file's text.
pub(super) fn to_json(state: &State) -> Result<String, Error> {
    let mut value = serde_json::to_value(state)?;
    let bits = |number: Option<f64>| number.map(|n| format!("{:016x}", n.to_bits()));
    value[BITS] = json!({"best_loss": bits(state.best_loss), "first_loss": bits(state.first_loss)});
    serde_json::to_string_pretty(&value)
}

/// The state that the text is of.
pub(super) fn from_json(text: &str) -> Result<State, Error> {
    let value: Value = serde_json::from_str(text)?;
    let bits = |name: &str| {
        let digits = value[BITS][name].as_str()?;
        u64::from_str_radix(digits, 16).ok().map(f64::from_bits)
    };
    let (best, first) = (bits("best_loss"), bits("first_loss"));
    let mut state: State = serde_json::from_value(value)?;
    state.best_loss = best.or(state.best_loss);
    state.first_loss = first.or(state.first_loss);
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn every_bit_comes_back() {
        let mut bits = 0x3ff1_2345_6789_abcd_u64;
        let mut lost = 0;
        for _ in 0..2000 {
            bits = bits.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let loss = f64::from_bits(bits >> 12 | 0x4000_0000_0000_0000);
            let state = State { best_loss: Some(loss), first_loss: Some(-loss), ..State::begin(&Recipe::QUARTER, 3) };
            let text = to_json(&state).unwrap();
            assert_eq!(from_json(&text).unwrap(), state);
            assert_eq!(to_json(&from_json(&text).unwrap()).unwrap(), text);
            // The negative control: the digits alone are not enough.
            lost += usize::from(serde_json::from_str::<State>(&text).unwrap() != state);
        }
        assert!(lost > 0);
    }
}
