//! What each program answers, and how it is asked to give way. Shapes are those of the projects' own documents.

use std::fmt;
use std::time::Duration;

use reqwest::{Client, Method, Url, redirect};
use serde_json::{Value, json};
use vramd_api::DeviceId;
use vramd_api::worker_protocol::{UNLOAD_MODEL, megabytes};

use super::{Bridge, BridgeKind};

/// How long a program may take to say what it has, and to give way: before that Ollama ends what it computes.
const LOOK_PATIENCE: Duration = Duration::from_secs(3);
const GIVE_PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer that is read.
const MOST_BYTES: usize = 4 << 20;
/// As much of an answer that cannot be read is shown.
const SHOWN: usize = 80;

#[derive(Debug)]
pub struct Program {
    kind: BridgeKind,
    url: String,
    device: DeviceId,
    size_bytes: Option<u64>,
    client: Client,
}

impl fmt::Display for BridgeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ollama => "Ollama",
            Self::ComfyUi => "ComfyUI",
            Self::Vllm => "vLLM",
            Self::LlamaSwap => "llama-swap",
        })
    }
}

impl Program {
    pub fn new(bridge: &Bridge, device: &DeviceId) -> Result<Self, String> {
        let client = Client::builder()
            .connect_timeout(LOOK_PATIENCE)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|error| error.to_string())?;
        let url = bridge.url.trim_end_matches('/').to_owned();
        Ok(Self { kind: bridge.kind, url, device: device.clone(), size_bytes: bridge.size_bytes, client })
    }

    pub fn shown(&self) -> String {
        format!("{} at {}", self.kind, self.url)
    }

    pub fn actions(&self) -> Vec<&'static str> {
        let mut actions = vec!["ping", "memory.get_model_info", UNLOAD_MODEL];
        if self.kind == BridgeKind::Vllm {
            actions.push("memory.restore_model");
        }
        actions
    }

    /// Whether it is there and what it should be.
    pub async fn look(&self) -> Result<(), String> {
        let path = match self.kind {
            BridgeKind::Ollama => "/api/ps",
            BridgeKind::ComfyUi => "/system_stats",
            BridgeKind::Vllm => "/is_sleeping",
            BridgeKind::LlamaSwap => "/running",
        };
        self.get(path).await.map(|_| ())
    }

    /// Its models, as the worker protocol has them.
    pub async fn models(&self) -> Result<Vec<Value>, String> {
        match self.kind {
            BridgeKind::Ollama => self.ollama().await,
            BridgeKind::ComfyUi => self.comfy_ui().await,
            BridgeKind::Vllm => self.vllm().await,
            BridgeKind::LlamaSwap => self.llama_swap().await,
        }
    }

    /// Has it let go of a model; answers how much that should free.
    pub async fn unload(&self, name: &str) -> Result<Value, String> {
        let models = self.models().await?;
        let model = models.iter().find(|model| model["name"] == name);
        let model = model.ok_or_else(|| format!("{} has no model {name}", self.kind))?;
        if model["busy"] == true {
            return Err(format!("{name} is in use"));
        }
        let acknowledged = &model["memory_mb"];
        match self.kind {
            BridgeKind::Ollama => {
                let body = json!({ "model": name, "keep_alive": 0 });
                let answer = self.ask(Method::POST, "/api/generate", Some(body)).await?;
                let answer = parsed("/api/generate", &answer)?;
                if answer["done_reason"] != "unload" {
                    return Err(format!(
                        "Ollama does not say that {name} goes: {}",
                        cut(&answer.to_string())
                    ));
                }
            }
            BridgeKind::ComfyUi => {
                let body = json!({ "unload_models": true, "free_memory": true });
                self.ask(Method::POST, "/free", Some(body)).await?;
            }
            // The weights stay in host memory, from where it wakes up within a second.
            BridgeKind::Vllm => drop(self.ask(Method::POST, "/sleep?level=1", None).await?),
            BridgeKind::LlamaSwap => {
                // A name may hold what has a meaning in a path.
                let mut path = Url::parse("http://x/api/models/unload").expect("a fixed address");
                path.path_segments_mut().expect("it has a path").push(name);
                drop(self.ask(Method::POST, path.path(), None).await?);
            }
        }
        Ok(json!({ "name": name, "acknowledged_mb": acknowledged }))
    }

    /// Has it come back.
    pub async fn restore(&self, name: &str) -> Result<Value, String> {
        if self.kind != BridgeKind::Vllm {
            return Err(format!("{} loads by itself", self.kind));
        }
        self.ask(Method::POST, "/wake_up", None).await?;
        Ok(json!({ "name": name }))
    }

    async fn ollama(&self) -> Result<Vec<Value>, String> {
        let answer = self.get("/api/ps").await?;
        let on_card = !self.device.as_str().starts_with("cpu:");
        let model = |model: &Value| {
            let all = model["size"].as_u64().unwrap_or(0);
            // It is left out where all of it is in host memory.
            let vram = model["size_vram"].as_u64().unwrap_or(0).min(all);
            let bytes = if on_card { vram } else { all - vram };
            self.model(model["name"].as_str()?, bytes, false)
        };
        Ok(list(&answer, "models", "/api/ps")?.iter().filter_map(model).collect())
    }

    async fn comfy_ui(&self) -> Result<Vec<Value>, String> {
        let answer = self.get("/system_stats").await?;
        let devices = list(&answer, "devices", "/system_stats")?;
        // What PyTorch holds there, all of it: it names no models. Of several cards that with our number.
        let number = self.device.as_str().rsplit(':').next().and_then(|number| number.parse::<u64>().ok());
        let ours = |device: &&Value| devices.len() == 1 || device["index"].as_u64() == number;
        let held = devices.iter().filter(ours).filter_map(|device| device["torch_vram_total"].as_u64());
        let held: u64 = held.fold(0, u64::saturating_add);
        let queue = self.get("/queue").await;
        let busy = queue.map_or(true, |queue| {
            let some = |list: &str| queue[list].as_array().is_none_or(|list| !list.is_empty());
            some("queue_running") || some("queue_pending")
        });
        Ok(if held == 0 { Vec::new() } else { self.model("models", held, busy).into_iter().collect() })
    }

    async fn vllm(&self) -> Result<Vec<Value>, String> {
        let answer = self.get("/is_sleeping").await?;
        let asleep = answer["is_sleeping"].as_bool().ok_or("/is_sleeping does not say is_sleeping")?;
        let answer = self.get("/v1/models").await?;
        let first = list(&answer, "data", "/v1/models")?.first().and_then(|model| model["id"].as_str());
        let Some(name) = first.map(ToOwned::to_owned) else { return Ok(Vec::new()) };
        if asleep {
            let mut model = self.model(&name, 0, false).ok_or("it has a model without a name")?;
            model["offloaded"] = true.into();
            return Ok(vec![model]);
        }
        // Whose state nobody knows counts as busy.
        let metrics = self.ask(Method::GET, "/metrics", None).await.unwrap_or_default();
        let running = metrics.lines().filter(|line| line.starts_with("vllm:num_requests_running"));
        let counts: Vec<f64> = running.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        let busy = counts.is_empty() || counts.iter().any(|count| *count > 0.0);
        Ok(self.model(&name, self.size_bytes.unwrap_or(0), busy).into_iter().collect())
    }

    async fn llama_swap(&self) -> Result<Vec<Value>, String> {
        let answer = self.get("/running").await?;
        let running = list(&answer, "running", "/running")?;
        let share = self.size_bytes.unwrap_or(0) / (running.len() as u64).max(1);
        let model = |model: &Value| {
            // One that starts or stops is not asked to.
            self.model(model["model"].as_str()?, share, model["state"] != "ready")
        };
        Ok(running.iter().filter_map(model).collect())
    }

    fn model(&self, name: &str, bytes: u64, busy: bool) -> Option<Value> {
        let memory_mb = megabytes(bytes);
        (!name.is_empty())
            .then(|| json!({ "name": name, "device_id": self.device, "memory_mb": memory_mb, "busy": busy }))
    }

    async fn get(&self, path: &str) -> Result<Value, String> {
        parsed(path, &self.ask(Method::GET, path, None).await?)
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> Result<String, String> {
        let patience = if method == Method::GET { LOOK_PATIENCE } else { GIVE_PATIENCE };
        let shown = format!("{method} {path}");
        let mut request = self.client.request(method, format!("{}{path}", self.url)).timeout(patience);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let failed = |error: reqwest::Error| {
            if error.is_timeout() {
                return format!("{shown}: no answer within {} s", patience.as_secs());
            }
            let mut cause: &dyn std::error::Error = &error;
            while let Some(source) = cause.source() {
                cause = source;
            }
            format!("{shown}: {cause}")
        };
        let mut response = request.send().await.map_err(failed)?;
        let status = response.status();
        if !status.is_success() {
            return Err(format!("{shown}: it answered {status}"));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > MOST_BYTES {
                return Err(format!("{shown}: it answered more than {MOST_BYTES} bytes"));
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn parsed(path: &str, text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|_| format!("{path}: it answered no JSON: {}", cut(text)))
}

fn list<'a>(answer: &'a Value, field: &str, path: &str) -> Result<&'a Vec<Value>, String> {
    let found = answer[field].as_array();
    found.ok_or_else(|| format!("{path}: it answered without {field}: {}", cut(&answer.to_string())))
}

fn cut(text: &str) -> String {
    text.chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect()
}
