//! The command line. Each command's own options lie beside its code.

use clap::builder::Styles;
use clap::builder::styling::AnsiColor;
use clap::{Args, Parser, Subcommand, ValueEnum};
use fourfold_kernels::{Activations, CpuOptions, FloatProducts, Isa, KvDtype};

use crate::commands::{
    bench, chat, compare, compress, demo, devices, docs, eval, export, generate, imatrix, inspect, merge, plan, serve,
    train, verify,
};
use crate::device::DeviceArg;
use crate::human;
use crate::limits;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

const AFTER: &str = "\
A MODEL is a Hugging Face directory (safetensors, plain or compressed-tensors), a .gguf file, or a name on the Hugging Face
hub (org/name or org/name@revision), which is downloaded. Without a command, the demonstration runs.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.";

/// Fits a language model into a quarter of the memory, and shows what that cost.
#[derive(Parser)]
#[command(version, styles = STYLES, after_help = AFTER, subcommand_required = false)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Show what is in a checkpoint, where its bytes are, and what memory running and training it take.
    Inspect(inspect::InspectArgs),
    /// Write a smaller checkpoint.
    Compress(Box<compress::CompressArgs>),
    /// Write a model as GGUF (llama.cpp, Ollama, LM Studio), or as a plain Hugging Face checkpoint.
    Export(Box<export::ExportArgs>),
    /// Write llama.cpp's importance matrix of a model over some text.
    Imatrix(imatrix::ImatrixArgs),
    /// Measure a model on a text, alone or against the original.
    Eval(Box<eval::EvalArgs>),
    /// Put two models side by side: bytes, memory, speed, errors, samples; as one HTML page, Markdown or JSON.
    Compare(compare::CompareArgs),
    /// Continue a prompt.
    Generate(generate::GenerateArgs),
    /// Talk with a model.
    Chat(chat::ChatArgs),
    /// List what models can run on: the CPU, and GPUs with their drivers.
    Devices,
    /// Serve a model over HTTP: OpenAI's API and a chat page.
    Serve(Box<serve::ServeArgs>),
    /// Measure speed: prompt and answer tokens a second.
    Bench(bench::BenchArgs),
    /// Predict the peak memory of a training run, or find what fits into a given memory.
    Plan(plan::PlanArgs),
    /// Train a model, from nothing or from a checkpoint, in a fraction of the usual memory.
    Train(Box<train::TrainArgs>),
    /// Write a model with an adapter (LoRA) inside its weights.
    Merge(Box<merge::MergeArgs>),
    /// Compare every file of an output with its checksums: 0 where all are as they were written, 1 with the name of each that is not.
    Verify(verify::VerifyArgs),
    /// Print the completions of a shell, or write the manual's pages.
    Docs(docs::DocsArgs),
    /// Compress the small model that comes with fourfold and show what that cost (the default without a command).
    Demo(demo::DemoArgs),
}

/// Options of every command.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Threads to compute with, at most four for each core; 0 for as many as there are cores [default: 0].
    #[arg(short, long, global = true, default_value_t = 0, hide_default_value = true, value_name = "N",
          value_parser = limits::THREADS)]
    pub threads: usize,
    /// Print one JSON object on stdout instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// No progress bars and no remarks on stderr.
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Instruction set of the kernels [default: the best this machine has].
    #[arg(long, global = true, value_name = "SET")]
    pub isa: Option<IsaArg>,
    /// Precision of activations in products: `fast` rounds them to int8, bf16 or int16 where that pays.
    #[arg(long, global = true, default_value = "fast", value_name = "PRECISION")]
    pub activations: ActivationsArg,
    /// What fast products of floats are made in [default: the fastest on this machine].
    #[arg(long, global = true, value_name = "TYPE")]
    pub float_products: Option<FloatProductsArg>,
    /// Where models run: `auto`, `cpu`, `gpu` or `gpu:N` of `fourfold devices`. `auto` is a GPU that holds the model, where there is
    /// one. Training and compressing compute on the CPU.
    #[arg(long, global = true, default_value_t = DeviceArg::Auto, value_name = "DEVICE")]
    pub device: DeviceArg,
    /// Most bytes to take of the device's memory, as `8GB` [default: what there is].
    #[arg(long, global = true, value_parser = human::parse_bytes, value_name = "SIZE")]
    pub device_memory: Option<u64>,
    /// Load a model even if it takes more memory than is available, and train even if the predicted peak is more.
    #[arg(long, global = true)]
    pub no_memory_check: bool,
    /// How cached keys and values are stored.
    #[arg(long, global = true, default_value = "f16", value_name = "TYPE")]
    pub kv_dtype: KvArg,
}

impl Global {
    /// The options that a run of this program by itself must share.
    pub fn for_child(&self, command: &str) -> Vec<String> {
        let mut options = vec![format!("--threads={}", self.threads)];
        options.push(format!("--activations={}", spelling(&self.activations)));
        options.push(format!("--kv-dtype={}", spelling(&self.kv_dtype)));
        options.extend(self.isa.map(|isa| format!("--isa={}", spelling(&isa))));
        options.extend(self.float_products.map(|products| format!("--float-products={}", spelling(&products))));
        if devices::COMMANDS.contains(&command) {
            options.push(format!("--device={}", self.device));
            options.extend(self.device_memory.map(|bytes| format!("--device-memory={bytes}B")));
        }
        options.extend(self.no_memory_check.then(|| "--no-memory-check".to_owned()));
        options.extend(self.quiet.then(|| "--quiet".to_owned()));
        options
    }

    /// What the CPU backend is to be, with some number of threads.
    pub fn cpu(&self, threads: usize) -> CpuOptions {
        CpuOptions {
            threads,
            isa: self.isa.map(Into::into),
            activations: self.activations.into(),
            products: self.float_products.map(Into::into),
        }
    }
}

/// How a value is written on the command line.
fn spelling(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum IsaArg {
    Portable,
    Avx2,
    Avx512,
}

impl From<IsaArg> for Isa {
    fn from(arg: IsaArg) -> Self {
        match arg {
            IsaArg::Portable => Self::Portable,
            IsaArg::Avx2 => Self::Avx2,
            IsaArg::Avx512 => Self::Avx512,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ActivationsArg {
    F32,
    Fast,
}

impl From<ActivationsArg> for Activations {
    fn from(arg: ActivationsArg) -> Self {
        match arg {
            ActivationsArg::F32 => Self::F32,
            ActivationsArg::Fast => Self::Fast,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum FloatProductsArg {
    F32,
    Bf16,
    Int16,
}

impl From<FloatProductsArg> for FloatProducts {
    fn from(arg: FloatProductsArg) -> Self {
        match arg {
            FloatProductsArg::F32 => Self::F32,
            FloatProductsArg::Bf16 => Self::Bf16,
            FloatProductsArg::Int16 => Self::Int16,
        }
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum KvArg {
    F32,
    F16,
    Bf16,
}

impl From<KvArg> for KvDtype {
    fn from(arg: KvArg) -> Self {
        match arg {
            KvArg::F32 => Self::F32,
            KvArg::F16 => Self::F16,
            KvArg::Bf16 => Self::Bf16,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::parsers::{is_number, takes};

    /// Numbers of which any is right.
    const ANY: [&str; 1] = ["seed"];

    /// A new option is looked at as soon as it is there.
    #[test]
    fn no_number_is_without_limits() {
        let mut cli = Cli::command();
        cli.build();
        let mut looked_at = 0;
        for command in cli.get_subcommands().chain([&cli]) {
            for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values()) {
                let Some(whole) = is_number(arg) else { continue };
                let name = format!("{} --{}", command.get_name(), arg.get_id());
                looked_at += 1;
                let huge = ["18446744073709551615", "9000000000000000000", "100000000000000000000"];
                let any = ANY.contains(&arg.get_id().as_str());
                for value in
                    ["", "x", "nan", "inf", "-inf", "1e300", "-1e300", "0x10", "--1", "1,5"].iter().chain(&huge)
                {
                    let fits = any && huge[..2].contains(value);
                    assert_eq!(takes(arg, value), fits, "{name} {value:?}");
                }
                assert!(!whole || !takes(arg, "0.5"), "{name} 0.5");
                let default = arg.get_default_values().first().and_then(|v| v.to_str());
                assert!(default.is_none_or(|value| takes(arg, value)), "{name}: its default");
            }
        }
        assert!(looked_at > 60, "{looked_at}: clap's introspection has found too little");
    }
}
