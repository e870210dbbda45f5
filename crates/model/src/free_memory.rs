//! How much memory a device has left.

use std::fs;
use std::path::Path;

use candle_core::Device;

use crate::error::ModelError;

/// Bytes that are free for what is spread evenly over `devices`: of a GPU its own memory, or main memory: what is left of the container's
/// limit, or where there is none half of what the machine has available, since others live on it.
///
/// # Errors
/// [`ModelError::Device`] where the system does not say.
pub fn free_memory(devices: &[Device]) -> Result<u64, ModelError> {
    let each = devices.iter().map(of_one).collect::<Result<Vec<_>, _>>()?;
    Ok(each.into_iter().min().unwrap_or(0) * devices.len() as u64)
}

fn of_one(device: &Device) -> Result<u64, ModelError> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => match gpu.cuda_stream().context().mem_get_info() {
            Ok((free, _)) => Ok(free as u64),
            Err(error) => Err(ModelError::Device(format!("the GPU does not tell what memory it has free: {error}"))),
        },
        _ => main_memory(),
    }
}

fn main_memory() -> Result<u64, ModelError> {
    let read = |path: &Path| fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).as_deref().and_then(available).ok_or_else(|| {
        let message = "the system does not tell what memory it has free (MemAvailable in /proc/meminfo): give --kv-memory a size";
        ModelError::Device(message.into())
    })?;
    // All groups that this process is in, from its own upwards: each may have a limit. In a container its own is the root.
    let group = read(Path::new("/proc/self/cgroup")).as_deref().and_then(unified).map(str::to_owned).unwrap_or_default();
    let root = Path::new("/sys/fs/cgroup");
    let groups = Path::new(&group).ancestors().map(|group| root.join(group));
    let left = groups.filter_map(|group| {
        let file = |name: &str| read(&group.join(name));
        left(&file("memory.max")?, &file("memory.current")?, &file("memory.stat")?)
    });
    Ok(left.min().map_or(machine / 2, |left| left.min(machine)))
}

/// Bytes that the machine can give without swapping, by `/proc/meminfo`.
fn available(meminfo: &str) -> Option<u64> {
    let kilobytes = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.trim().strip_suffix("kB")?;
    kilobytes.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The group of this process in the unified hierarchy, by `/proc/self/cgroup`, without the leading slash.
fn unified(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::/"))
}

/// Bytes that a group may still take, by its `memory.max`, `memory.current` and `memory.stat`; `None` where it has no limit. Pages of
/// files count among what it has, and are given up when memory is wanted.
fn left(limit: &str, current: &str, stat: &str) -> Option<u64> {
    let limit: u64 = limit.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let of = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok()).unwrap_or(0);
    let files = of("active_file ") + of("inactive_file ");
    Some(limit.saturating_sub(current.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_left_what_its_limit_leaves_and_files_do_not_count() {
        let stat = "anon 300\nfile 900\nactive_file 200\ninactive_file 600\nslab 9\n";
        assert_eq!(left("2000\n", "1200\n", stat), Some(1600));
        assert_eq!(left("1000\n", "1900\n", ""), Some(0), "over its limit");
        assert_eq!(left("max\n", "1200\n", stat), None);
    }

    #[test]
    fn the_system_tells_what_is_available() {
        assert_eq!(available("MemTotal:       16384 kB\nMemAvailable:    4096 kB\n"), Some(4 << 20));
        assert_eq!(available("MemTotal:       16384 kB\n"), None);
        assert_eq!(unified("1:cpu:/other\n0::/kubepods/pod1/container\n"), Some("kubepods/pod1/container"));
        assert_eq!(unified("0::/\n"), Some(""));
        let free = free_memory(&[Device::Cpu]).unwrap();
        assert!(free > 1 << 20, "{free} bytes");
    }
}
