// Rotates pairs of part of each head, in place.
struct Params {
    pairs: u32,
    half: u32,
    heads: u32,
    head_dim: u32,
    start: u32,
    interleaved: u32,
    first_position: u32,
}

var<immediate> p: Params;

@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read> cosines: array<f32>;
@group(0) @binding(2) var<storage, read> sines: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups_there: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    let i = (group.y * groups_there.x + group.x) * 64u + thread;
    if (i >= p.pairs) {
        return;
    }
    let pair = i % p.half;
    let head = i / p.half;
    let angle = (p.first_position + head / p.heads) * p.half + pair;
    let first = head * p.head_dim + p.start;
    var a = first + pair;
    var b = first + pair + p.half;
    if (p.interleaved == 1u) {
        a = first + 2u * pair;
        b = a + 1u;
    }
    let c = cosines[angle];
    let s = sines[angle];
    let u = x[a];
    let v = x[b];
    x[a] = u * c - v * s;
    x[b] = u * s + v * c;
}
