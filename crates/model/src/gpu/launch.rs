//! Attention on a GPU, and how rows get into its cache (`kernels/attention.cu`).

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, CustomOp3, DType, InplaceOp2, Layout, Result, Shape, Tensor, bail};
use half::f16;

use crate::config::LlamaConfig;
use crate::gpu::compiled::OverCache;
use crate::gpu::tiles::{THREADS, Tiles, fits, shared, slots};
use crate::pass::Chunk;

static KERNELS: OverCache =
    OverCache::new(["attention_f16", "attention_f32"], concat!(include_str!("kernels/stored.cu"), include_str!("kernels/attention.cu")));

fn grid(x: usize, y: usize, z: usize, shared_floats: usize) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (x as u32, y as u32, z as u32),
        block_dim: (THREADS as u32, 1, 1),
        shared_mem_bytes: (shared_floats * size_of::<f32>()) as u32,
    }
}

/// What the kernels are told of a pass, on its device.
pub(crate) struct Told {
    /// Of its tokens' rows.
    slots: CudaSlice<i32>,
    /// `None` where the kernel does not compute the attention of such a model.
    pub(crate) tiles: Option<OnDevice>,
}

/// [`Tiles`], there.
pub(crate) struct OnDevice {
    tables: CudaSlice<i32>,
    tiles: CudaSlice<i32>,
    segments: usize,
}

impl Told {
    pub(crate) fn of(chunks: &[Chunk<'_>], config: &LlamaConfig, block_tokens: usize, device: &CudaDevice) -> Result<Self> {
        let upload = |numbers: &[i32]| device.clone_htod(numbers);
        let tiles = match fits(config) {
            true => {
                let Tiles { tables, tiles, segments } =
                    Tiles::of(chunks, block_tokens, config.heads / config.kv.kv_heads, config.kv.kv_heads);
                Some(OnDevice { tables: upload(&tables)?, tiles: upload(&tiles)?, segments })
            }
            false => None,
        };
        Ok(Self { slots: upload(&slots(chunks, block_tokens))?, tiles })
    }
}

/// Puts the rows of a pass's tokens, `[tokens, kv_heads, head_dim]`, into their slots of `rows`.
///
/// # Errors
/// Where the device has no memory, or the kernel does not compile.
pub(crate) fn append(rows: &Tensor, from: &Tensor, told: &Told) -> Result<()> {
    rows.inplace_op2(&from.contiguous()?, &Append { slots: &told.slots })
}

struct Append<'a> {
    slots: &'a CudaSlice<i32>,
}

impl Append<'_> {
    fn run<T: CudaDType + DeviceRepr>(&self, rows: &mut CudaStorage, from: &CudaStorage, layout: &Layout) -> Result<()> {
        let device = from.device().clone();
        let append = KERNELS.kernel(&device, "append", rows.dtype())?;
        let from = from.as_cuda_slice::<f32>()?.slice(layout.start_offset()..);
        let width = (layout.shape().elem_count() / self.slots.len()) as i32;
        let stream = device.cuda_stream();
        let mut launch = stream.launch_builder(&append);
        launch.arg(rows.as_cuda_slice_mut::<T>()?).arg(&from).arg(self.slots).arg(&width);
        // SAFETY: the kernel reads `width` numbers for each slot from `from`, and writes as many to slots of a block table that was
        // checked against the cache.
        unsafe { launch.launch(grid(self.slots.len(), 1, 1, 0)) }.w()?;
        Ok(())
    }
}

impl InplaceOp2 for Append<'_> {
    fn name(&self) -> &'static str {
        "append to the KV cache"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        bail!("{} is a GPU's", self.name())
    }

    fn cuda_fwd(&self, rows: &mut CudaStorage, _: &Layout, from: &CudaStorage, layout: &Layout) -> Result<()> {
        match rows.dtype() {
            DType::F16 => self.run::<f16>(rows, from, layout),
            _ => self.run::<f32>(rows, from, layout),
        }
    }
}

/// Attention of a pass's queries `[tokens, heads, head_dim]` over one layer's keys and values `[slots, kv_heads, head_dim]`: as the
/// queries are.
pub(crate) struct Attention<'a> {
    pub(crate) tiles: &'a OnDevice,
    pub(crate) config: &'a LlamaConfig,
    /// How many positions a token sees.
    pub(crate) window: usize,
    pub(crate) block_tokens: usize,
}

impl Attention<'_> {
    fn run<T: CudaDType + DeviceRepr>(&self, q: &CudaStorage, queries: &Layout, [keys, values]: [&CudaStorage; 2]) -> Result<CudaStorage> {
        let (device, kv) = (q.device(), self.config.kv);
        let OnDevice { tables, tiles, segments } = self.tiles;
        let rows = queries.shape().elem_count() / kv.head_dim;
        // SAFETY: every number of it is written before it is read: each row is of one tile.
        let mut out: CudaSlice<f32> = unsafe { device.alloc(rows * kv.head_dim) }?;
        let left = if *segments > 1 { rows * segments * (kv.head_dim + 2) } else { 1 };
        // SAFETY: as above; with one segment nobody reads it.
        let mut partial: CudaSlice<f32> = unsafe { device.alloc(left) }?;
        let q = q.as_cuda_slice::<f32>()?.slice(queries.start_offset()..);
        let [heads, kv_heads, head_dim, block_tokens] = [self.config.heads, kv.kv_heads, kv.head_dim, self.block_tokens].map(|n| n as i32);
        let window = i32::try_from(self.window).unwrap_or(i32::MAX);
        let scale = self.config.scalars.attention as f32;
        let cap = self.config.scalars.attention_cap.unwrap_or(0.0) as f32;
        let attention = KERNELS.kernel(device, "attention", keys.dtype())?;
        let stream = device.cuda_stream();
        let mut launch = stream.launch_builder(&attention);
        launch.arg(&mut out).arg(&mut partial).arg(&q).arg(keys.as_cuda_slice::<T>()?).arg(values.as_cuda_slice::<T>()?);
        launch.arg(tables).arg(tiles).arg(&heads).arg(&kv_heads).arg(&head_dim).arg(&block_tokens).arg(&window);
        launch.arg(&scale).arg(&cap);
        // SAFETY: tiles and tables are of the chunks, which were checked against the cache; the others have the sizes that are told.
        unsafe { launch.launch(grid(tiles.len() / 4, kv.kv_heads, *segments, shared(kv.head_dim))) }.w()?;
        if *segments > 1 {
            let join = KERNELS.kernel(device, "join_segments", keys.dtype())?;
            let segments = *segments as i32;
            let mut launch = stream.launch_builder(&join);
            launch.arg(&mut out).arg(&partial).arg(&segments).arg(&head_dim);
            // SAFETY: `partial` has what was written of every row and segment.
            unsafe { launch.launch(grid(rows, 1, 1, 0)) }.w()?;
        }
        Ok(CudaStorage::wrap_cuda_slice(out, device.clone()))
    }
}

impl CustomOp3 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention over the paged KV cache"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{} is a GPU's", self.name())
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        queries: &Layout,
        keys: &CudaStorage,
        _: &Layout,
        values: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let out = match keys.dtype() {
            DType::F16 => self.run::<f16>(q, queries, [keys, values])?,
            _ => self.run::<f32>(q, queries, [keys, values])?,
        };
        Ok((out, queries.shape().clone()))
    }
}
