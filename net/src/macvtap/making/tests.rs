use super::*;

#[test]
fn other_address_than_asked_for_is_told_with_both() {
    let [wanted, has] = ["02:00:00:00:00:01", "02:00:00:00:00:02"].map(|mac| mac.parse().unwrap());
    let text = other_mac("mvt0", wanted, has);
    for part in ["mvt0", "02:00:00:00:00:01", "02:00:00:00:00:02", "udev"] {
        assert!(text.contains(part), "{text}");
    }
}
