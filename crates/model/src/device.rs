//! Devices by name.

use candle_core::Device;

use crate::error::ModelError;

/// `cpu` or `cuda:N`.
///
/// # Errors
/// [`ModelError::Device`] where the name is none, this build has no CUDA, or there is no such GPU.
pub fn parse(name: &str) -> Result<Device, ModelError> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let Some(index) = name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) else {
        return Err(ModelError::Device(format!("'{name}' is no device: use cpu or cuda:N")));
    };
    Device::new_cuda(index)
        .map_err(|e| ModelError::Device(format!("{name} cannot be used: {e} (a GPU needs a build with `--features cuda`)")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert!(parse("cpu").unwrap().is_cpu());
        assert!(parse("gpu").unwrap_err().to_string().contains("'gpu'"));
        #[cfg(not(feature = "cuda"))]
        assert!(parse("cuda:0").unwrap_err().to_string().contains("--features cuda"));
    }
}
