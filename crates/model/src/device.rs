//! Devices by name.

use candle_core::Device;

use crate::error::ModelError;

/// `cpu` or `cuda:N`.
///
/// # Errors
/// [`ModelError::Device`] where the name is none, this build has no CUDA, a library of CUDA's is missing, or there is no such GPU.
pub fn parse(name: &str) -> Result<Device, ModelError> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let Some(index) = name.strip_prefix("cuda:").and_then(|n| n.parse().ok()) else {
        return Err(ModelError::Device(format!("'{name}' is no device: use cpu or cuda:N")));
    };
    #[cfg(feature = "cuda")]
    overfill_cuda::load().map_err(|missing| ModelError::Device(format!("{name} cannot be used: {missing}")))?;
    Device::new_cuda(index)
        .map_err(|e| ModelError::Device(format!("{name} cannot be used: {e} (a GPU needs a build with `--features cuda`)")))
}

/// Several GPUs that have a part of one model each, or one device.
///
/// # Errors
/// As [`parse`], and where several are named that are not different GPUs.
pub fn parse_all(names: &[String]) -> Result<Vec<Device>, ModelError> {
    let distinct = names.iter().enumerate().all(|(i, name)| name.starts_with("cuda:") && !names[..i].contains(name));
    if names.is_empty() || names.len() > 1 && !distinct {
        return Err(ModelError::Device(format!("'{}' are no devices of one model: use cpu, or GPUs as in cuda:0,cuda:1", names.join(","))));
    }
    names.iter().map(|name| parse(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert!(parse("cpu").unwrap().is_cpu());
        assert!(parse("gpu").unwrap_err().to_string().contains("'gpu'"));
        let all = |names: &[&str]| parse_all(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(all(&["cpu"]).unwrap().len(), 1);
        for none in [&[][..], &["cpu", "cuda:0"], &["cuda:0", "cuda:0"], &["cpu", "cpu"]] {
            assert!(all(none).unwrap_err().to_string().contains("are no devices of one model"), "{none:?}");
        }
        #[cfg(not(feature = "cuda"))]
        assert!(parse("cuda:0").unwrap_err().to_string().contains("--features cuda"));
    }
}
