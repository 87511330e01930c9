//! GPTQ against an independent implementation in another formulation: `scripts/golden_gptq.py`.

use fourfold_compress::hessian::Hessian;
use fourfold_compress::methods::quantize::gptq::{Gptq, Order};
use fourfold_compress::methods::quantize::grid::{Granularity, GridSpec, ScaleFormat, ScaleRule};
use fourfold_compress::methods::{Method, Stats};
use fourfold_tensor::{Dense, Weight};
use serde_json::Value;

#[test]
fn gptq_gives_the_codes_of_the_papers_algorithm() {
    let golden: Value = serde_json::from_str(include_str!("golden/gptq.json")).unwrap();
    let int = |key: &str| golden[key].as_u64().unwrap() as usize;
    let floats = |key: &str| -> Vec<f32> {
        golden[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
    };
    let (rows, cols) = (int("rows"), int("cols"));
    let weight: Weight = Dense::from_f32(vec![rows, cols], floats("weight")).into();
    let hessian = Hessian::from_matrix(cols, floats("hessian"));
    let grid = GridSpec {
        scales: ScaleFormat::F32,
        rule: ScaleRule::Absmax,
        ..GridSpec::new(int("bits") as u8, Granularity::Group(int("group")))
    };
    let gptq =
        Gptq { order: Order::Natural, polish: 0, damping: golden["damping"].as_f64().unwrap(), ..Gptq::new(grid) };
    let out = gptq.compress(&weight, Stats { moments: None, hessian: Some(&hessian) }).unwrap();
    let Weight::Quantized(q) = &out.weight else { panic!("not quantized") };
    let (scales, wanted) = (floats("scales"), floats("codes"));
    for r in 0..rows {
        let mut codes = vec![0u8; cols];
        q.row_codes(r, &mut codes);
        let found: Vec<f32> = codes.into_iter().map(f32::from).collect();
        assert_eq!(found, wanted[r * cols..(r + 1) * cols], "row {r}");
        for g in 0..q.groups() {
            let (found, wanted) = (q.scale(r, g), scales[r * q.groups() + g]);
            assert!((found - wanted).abs() < 1e-4 * wanted, "scale of row {r}, group {g}: {found}, {wanted}");
        }
    }
}
